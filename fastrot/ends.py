"""The ends of the residual stream, for an R1 that leaves them alone.

The stream is rotated where it enters the first layer and turned back where it enters the last norm;
embeddings, whatever is added to them, last norm and head are those of the original model. So tied
embeddings stay tied, and all that reads them (drafts of tokens, adapters, prompts) stays exact.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastrot.errors import RotationError
from fastrot.index import Index, find_holders, find_modules
from fastrot.mapping import Mapping, NormMapping, Patterns
from fastrot.sites import find_sites
from fastrot.transform_config import TransformArgs

WAY_OUT = "leave keep_head out"


def between_ends(
    index: Index,
    mapping: Mapping,
    norms: Sequence[NormMapping],
    places: Iterable[TransformArgs],
) -> tuple[TransformArgs, ...]:
    """Those of R1's places that lie between the ends, and an online one at each end.

    Args:
        index: the model.
        mapping: its roles.
        norms: which norm feeds which readers.
        places: of an R1 that rotates everything.

    Raises:
        RotationError: the layers are no single list, or are left out at random, or no single norm
            stands behind them; a pattern names something on both sides, or what it names writes
            on both.
    """
    if both := find_holders(index, mapping.throughout):
        raise RotationError(
            f"keep_head rotates from the first layer on, but {', '.join(both)} of "
            f"{index.class_name} may write before it and between others; {WAY_OUT}"
        )
    layers = _layers(index, mapping)
    last = _last_norm(index, mapping, norms, layers)
    inside = (
        replace(place, targets=_inside(index, place.targets, layers, mapping.between))
        for place in places
    )
    return (
        *(place for place in inside if place.targets),
        TransformArgs((_pattern(index, f"{layers}.0"),), "input"),
        TransformArgs((_pattern(index, last),), "input", inverse=True),
    )


def _layers(index: Index, mapping: Mapping) -> str:
    """The name of the list of layers: that in which the readers of the stream lie."""
    found = (re.match(r"(.+?)\.\d+\.", name) for name in find_sites(index, mapping.stream_readers))
    lists = {match[1] for match in found if match}
    if len(lists) != 1 or f"{min(lists)}.0" not in index.modules:
        raise RotationError(
            f"keep_head rotates the input of the first layer, but the layers of {index.class_name} "
            f"are in {', '.join(sorted(lists)) or 'no list'}; {WAY_OUT}"
        )
    drop = getattr(index.config.get_text_config(), "layerdrop", 0)
    if drop:
        raise RotationError(
            f"keep_head rotates the input of the first layer, which layerdrop={drop} leaves out at "
            f"times in training; set config.layerdrop = 0, or {WAY_OUT}"
        )
    return lists.pop()


def _last_norm(index: Index, mapping: Mapping, norms: Sequence[NormMapping], layers: str) -> str:
    """The norm that the head reads."""
    heads = find_sites(index, mapping.lm_head).keys()
    found = [
        name
        for norm in norms
        if norm.norm is not None and heads & find_sites(index, norm.linears, missing_ok=True).keys()
        for name in find_modules(index, (norm.norm,), missing_ok=True)
        if not name.startswith(f"{layers}.")
    ]
    if len(found) != 1:
        raise RotationError(
            f"keep_head turns the stream back before the norm that {', '.join(heads)} reads, of "
            f"which {index.class_name} has {', '.join(found) or 'none'}; {WAY_OUT}"
        )
    (name,) = found
    if getattr(index.modules[name], "weight", None) is None:
        raise RotationError(
            f"keep_head: the last norm of {index.class_name}, {name}, has no weight, and the model "
            f"may use it elsewhere too, where nothing is to be turned back; {WAY_OUT}"
        )
    return name


def _inside(index: Index, patterns: Patterns, layers: str, between: Patterns) -> Patterns:
    """The patterns that name what meets the stream between its ends."""
    others = find_holders(index, between).keys()

    def within(pattern: str) -> bool:
        found = find_holders(index, (pattern,))
        lie = {name in others or name.startswith(f"{layers}.") for name in found}
        if len(lie) > 1:
            raise RotationError(
                f"keep_head: {pattern!r} names modules inside and outside of {layers}; give each "
                "a pattern of its own in mappings"
            )
        return lie == {True}

    return tuple(pattern for pattern in patterns if within(pattern))


def _pattern(index: Index, name: str) -> str:
    """What names a module in the model, and in its base model alone."""
    base = re.escape(f"{index.model.base_model_prefix}.")
    inner = name.removeprefix(f"{index.model.base_model_prefix}.")
    return f"re:({base})?{re.escape(inner)}$" if inner != name else name
