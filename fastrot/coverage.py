"""Whether a mapping says of every parameter how it meets the residual stream."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fastrot.edits import OnlineSite, Rotate, WeightEdit
from fastrot.errors import RotationError
from fastrot.index import Index, find_holders
from fastrot.mapping import STREAM, Mapping, NormMapping
from fastrot.patterns import NoMatchError, matches, no_match_message
from fastrot.sites import find_sites


class UncoveredParameterError(RotationError):
    """Parameters of which the mapping does not say what they do with the residual stream."""


def classify(
    model: nn.Module | Index, mapping: Mapping, norms: Sequence[NormMapping]
) -> dict[str, str]:
    """The role of every parameter that has one, in a word, or ``untouched`` and why.

    A bias has the role of its weight. Parameters without a role are left out.
    """
    index, roles = Index.of(model), dict[str, str]()
    for role, patterns in (
        ("reader", mapping.stream_readers),
        ("writer", mapping.stream_writers),
        ("value", mapping.attn_v),
        ("latent", mapping.latent_readers),
    ):
        for site in find_sites(index, patterns).values():
            for name in filter(None, (site.weight, site.bias)):
                roles.setdefault(name, role)
    for role, pattern in (
        *(("norm", norm.norm) for norm in norms if norm.norm is not None),
        *(("post-norm", pattern) for pattern in mapping.post_norm),
    ):
        for owner, holder in find_holders(index, (pattern,), missing_ok=True).items():
            if isinstance(holder, nn.Parameter):
                roles.setdefault(owner, role)
                continue
            for leaf, _ in holder.named_parameters(recurse=False):
                roles.setdefault(f"{owner}.{leaf}", role)
    for name in index.parameters:
        for pattern, reason in mapping.ignore:
            if matches(name, pattern):
                roles.setdefault(name, f"untouched: {reason}" if reason else "untouched")
    return roles


def check_coverage(index: Index, mapping: Mapping, norms: Sequence[NormMapping]) -> None:
    """Refuse R1 if a reader has no norm mapping or a parameter no role.

    Raises:
        UncoveredParameterError: names what is missing, also buffers as wide as the stream, and
            guesses its role.
        NoMatchError: an entry of ``ignore`` matches nothing.
    """
    model = index.model
    fed = {name for norm in norms for name in find_sites(index, norm.linears)}
    without = sorted(set(find_sites(index, mapping.stream_readers)) - fed)
    if without:
        raise UncoveredParameterError(
            f"no norm mapping feeds {some(without)}; name its norm in norm_mappings "
            "(NormMapping(norm=None, …) if it reads the stream as it is)"
        )
    embeddings = find_sites(index, mapping.embedding).values()
    width = {site.shape[site.output] for site in embeddings}
    tensors: dict[str, Tensor] = dict(index.parameters)
    # Fixed positions are no parameters, but are added to the stream all the same.
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dim() and buffer.shape[-1] in width:
            tensors[name] = buffer
    for pattern, _ in mapping.ignore:
        if not any(matches(name, pattern) for name in tensors):
            raise NoMatchError(no_match_message(model, pattern, tensors))
    roles = classify(index, mapping, norms)
    leftover = [
        name
        for name in tensors
        if name not in roles and not any(matches(name, u.pattern) for u in mapping.ignore)
    ]
    if leftover:
        guesses = [f"{name} ({_guess(tuple(tensors[name].shape), width)})" for name in leftover]
        raise UncoveredParameterError(
            f"the mapping does not say how {some(guesses)} of {type(model).__name__} meets the "
            "residual stream; add it to a role or, if it does not, to Mapping.ignore"
        )


def check_one_stream(edits: Iterable[WeightEdit], sites: Iterable[OnlineSite]) -> None:
    """Refuse R1 on streams of different widths."""
    sizes: dict[int, str] = {}
    for edit in edits:
        for step in edit.steps:
            if isinstance(step, Rotate) and step.group == STREAM:
                sizes.setdefault(step.rotation.size, edit.parameter)
    for site in sites:
        if site.group == STREAM:
            sizes.setdefault(site.rotation.size, site.module)
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise RotationError(
            f"R1 must act on one residual stream, but {first} has size {a} and {second} {b} there"
        )


def _guess(shape: tuple[int, ...], width: set[int]) -> str:
    if len(shape) > 1 and shape[-1] in width:
        return "perhaps a reader"
    if len(shape) > 1 and shape[-2] in width:
        return "perhaps a writer"
    if len(shape) == 1 and shape[0] in width:
        return "perhaps a norm, or the bias of a writer"
    return "perhaps to ignore"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
