"""Who reads and writes the residual stream, measured on a small model; no name is looked at.

A rotation of the stream that leaves the logits alone is a symmetry, and a symmetry shows in the
gradients (Noether's theorem). Rotating the stream by ``I + t A``, ``A`` antisymmetric, changes a
function of the logits at the rate

    sum over readers and writers of  tr(Aᵀ C) / 2,   C = Wᵀ G - Gᵀ W,

``W`` being a parameter as rows along the stream and ``G`` its gradient. This is zero for every
``A``, so the charges ``C`` of exactly the readers and writers add up to zero: a linear system, the
solution of which is 1 for what takes part and 0 for what does not. Likewise, scaling a norm up and
its readers down changes nothing, so a norm's charge ``γ G`` is the sum of its readers'; that finds
the readers of every norm, and the scale that they must take in before they can be rotated. And the
heads of the values turn with those of the output projection.

All of it holds up to float64's rounding, so that chance can't pass for a symmetry.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrot.edits import FoldedNorm, Part
from fastrot.mapping import NormKind
from fastrot.norms import check_norms
from fastrot.sites import Site, find_sites
from fastrot.suggest.tiny import logits, random_ids

NOISE = 1e-7
SKETCH = 8


class Leg(NamedTuple):
    """A dimension of a parameter, or of an activation (``norm.input``, ``norm.output``)."""

    name: str
    dim: int = -1


@dataclass
class Norm:
    """What a norm computes, and which legs read it."""

    offset: float
    kind: NormKind
    size: int
    readers: set[Leg] = field(default_factory=set)


@dataclass
class Findings:
    """What a model does with its residual stream.

    Attributes:
        sites: name of a parameter → its site.
        norms: name → norm.
        stream: the legs that lie along the stream.
        found: whether they add up, so that R1 is possible.
        centred: whether only rotations that fix the ones vector leave the model alone.
        post_norms: norms whose output is added to the stream → the legs that write into them.
        unclear: parameters that could not be placed, and why.
    """

    sites: dict[str, Site]
    norms: dict[str, Norm]
    stream: set[Leg] = field(default_factory=set)
    found: bool = False
    centred: bool = False
    post_norms: dict[str, set[Leg]] = field(default_factory=dict)
    unclear: dict[str, str] = field(default_factory=dict)


class Charges:
    """The charges of a model's parameters, and of what goes into its norms and comes out.

    Args:
        model: in float64.
        watched: the norms.
        count: how many random functions of the logits to derive.
    """

    def __init__(self, model: PreTrainedModel, watched: Iterable[str], count: int):
        tensors: dict[str, Tensor] = {
            name: parameter.requires_grad_()
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }
        self.parameters = {name: tuple(value.shape) for name, value in tensors.items()}
        self.scales: dict[Leg, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                _recorder(name, tensors), with_kwargs=True
            )
            for name in watched
        ]
        with torch.enable_grad():
            result = logits(model, random_ids(model, 1))
        for hook in hooks:
            hook.remove()
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        generator = torch.Generator().manual_seed(2)
        grads = [
            torch.autograd.grad(
                result,
                list(tensors.values()),
                torch.randn(result.shape, generator=generator, dtype=torch.float64),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for _ in range(count)
        ]
        names = list(tensors)
        self.grads = {name: [grad[i] for grad in grads] for i, name in enumerate(names)}
        self.values = {name: value.detach() for name, value in tensors.items()}

    def legs(self, size: int) -> list[Leg]:
        """All dimensions of parameters of this size."""
        return [
            Leg(name, dim)
            for name, shape in self.parameters.items()
            for dim, length in enumerate(shape)
            if length == size
        ]

    def scaling(self, leg: Leg, offset: float = 0.0) -> Tensor:
        """What scaling each channel of a leg does."""
        value, *grads = self._rows(leg)
        return torch.cat([((value + offset) * grad).sum(0) for grad in grads])

    def turning(
        self, leg: Leg, *, centred: bool = False, heads: tuple[Part, int] | None = None
    ) -> Tensor:
        """What turning a leg does, or what turning each head in a part of it does.

        A few random columns of the antisymmetric matrix ``C`` tell as much as all of them.
        """
        rows = self._rows(leg)
        if heads is not None:
            part, size = heads
            start = rows[0].shape[-1] // part.groups - part.behind - part.size
            rows = [
                r.unflatten(-1, (part.groups, -1)).narrow(-1, start, part.size).reshape(-1, size)
                for r in rows
            ]
        value, *grads = rows
        generator = torch.Generator().manual_seed(3)
        sketch = torch.randn(value.shape[-1], SKETCH, generator=generator, dtype=torch.float64)
        sketch = sketch - sketch.mean(0) if centred else sketch
        turned = torch.stack([g.T @ (value @ sketch) - value.T @ (g @ sketch) for g in grads])
        return (turned - turned.mean(1, keepdim=True) if centred else turned).flatten()

    def _rows(self, leg: Leg) -> list[Tensor]:
        """Value and gradients as ``(rows, size)``, after the scale of a norm was folded in."""
        tensors = [self.values[leg.name], *self.grads[leg.name]]
        rows = [t.movedim(leg.dim, -1).reshape(-1, t.shape[leg.dim]) for t in tensors]
        scale = self.scales.get(leg)
        if scale is not None:
            rows = [rows[0] * scale, *(grad / scale for grad in rows[1:])]
        return rows


class Sum(NamedTuple):
    """Legs whose charges add up to a target.

    Attributes:
        legs: those that take part.
        doubtful: those that seem to take part with another share than 0 or 1.
        missing: share of the target that is left.
    """

    legs: set[Leg]
    doubtful: set[Leg]
    missing: float

    def __bool__(self) -> bool:
        return bool(self.legs) and not self.doubtful and self.missing < NOISE


def measure(model: PreTrainedModel) -> tuple[Findings, Charges]:
    """What a small model in float64 does with its residual stream."""
    found = {name: norm for name, module in model.named_modules() if (norm := _norm(name, module))}
    findings = Findings(_sites(model), found)
    shapes = [parameter.shape for parameter in model.parameters()]
    unknown = {norm.size: sum(s.count(norm.size) for s in shapes) for norm in found.values()}
    # Each function gives one equation per channel.
    count = max([6, *(2 * legs // size + 1 for size, legs in unknown.items())])
    charges = Charges(model, found, count)
    columns = {
        leg: charges.scaling(leg)
        for size in {norm.size for norm in found.values()}
        for leg in charges.legs(size)
        if len(charges.parameters[leg.name]) > 1
        and (leg.name not in findings.sites or findings.sites[leg.name].input == leg.dim)
    }
    for name, norm in found.items():
        norm.readers = _readers(name, norm, charges, columns)
        scale = charges.values[f"{name}.weight"] + norm.offset
        charges.scales |= dict.fromkeys(norm.readers, scale)
        if norm.readers:
            charges.scales[Leg(f"{name}.bias", 0)] = 1 / scale
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ends = [
        findings.sites[names[id(module.weight)]]
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    embedding, head = Leg(ends[0].weight, ends[0].output), Leg(ends[1].weight, ends[1].input or 0)
    _follow_stream(embedding, head, findings, charges)
    if not findings.found:
        width = getattr(model.config, "hidden_size", charges.parameters[head.name][head.dim])
        findings.stream = {embedding, head, *_by_shape(findings.sites.values(), width)}
        findings.post_norms = {}
    return findings, charges


def turn_together(charges: Charges, legs: Mapping[Leg, Part], head: int) -> bool:
    """Whether the logits stay as they are when all heads in these parts turn alike."""
    turned = torch.stack([charges.turning(leg, heads=(part, head)) for leg, part in legs.items()])
    return bool(turned.sum(0).norm() <= NOISE * turned.norm())


def _follow_stream(embedding: Leg, head: Leg, findings: Findings, charges: Charges) -> None:
    """Everything whose charge adds up to zero with that of the head, which reads the stream."""
    width = charges.parameters[head.name][head.dim]
    legs = [leg for leg in charges.legs(width) if leg != head]
    outputs = {
        Leg(f"{name}.output"): name
        for name, norm in findings.norms.items()
        if norm.size == width and not norm.readers and f"{name}.output" in charges.values
    }
    for centred in (False, True):
        columns = {leg: charges.turning(leg, centred=centred) for leg in (*legs, *outputs)}
        total = _solve(-charges.turning(head, centred=centred), columns)
        if total:
            break
    findings.found, findings.centred = bool(total), centred and bool(total)
    findings.stream = {head, *total.legs.difference(outputs)}
    findings.unclear = {leg.name: "takes part only in part" for leg in total.doubtful}
    for leg in total.legs.intersection(outputs):
        name = outputs[leg]
        written = _solve(
            charges.turning(Leg(f"{name}.input")), {leg: charges.turning(leg) for leg in legs}
        )
        findings.post_norms[name] = written.legs if written else set()
        if not written:
            findings.unclear[name] = "adds to the stream, but what writes into it is not clear"
    if embedding not in findings.stream.union(*findings.post_norms.values()):
        findings.found = False  # the head shares no stream with it
    weights = {site.bias: site.weight for site in findings.sites.values()}
    for leg in legs:
        alive = any(bool(grad.any()) for grad in charges.grads[weights.get(leg.name, leg.name)])
        if not alive and leg not in findings.stream:
            findings.unclear[leg.name] = "has no influence on the logits of the probe"


def _by_shape(sites: Iterable[Site], width: int) -> Iterator[Leg]:
    """For want of better: the dimension of a matrix that is the stream's, its input if both are."""
    for site in sites:
        fits = [dim for dim in (site.input, site.output) if dim is not None]
        fits = [dim for dim in fits if site.shape[dim] == width]
        if len(site.shape) > 1 and fits:
            yield Leg(site.weight, fits[0])


def _readers(name: str, norm: Norm, charges: Charges, columns: Mapping[Leg, Tensor]) -> set[Leg]:
    """The legs that read a norm: scaling it up and them down changes nothing."""
    target = charges.scaling(Leg(f"{name}.weight", 0), norm.offset)
    if f"{name}.bias" in charges.values:
        target = target + charges.scaling(Leg(f"{name}.bias", 0))
    total = _solve(target, {leg: c for leg, c in columns.items() if c.shape == target.shape})
    return total.legs if total else set()


def _solve(target: Tensor, columns: Mapping[Leg, Tensor]) -> Sum:
    """The columns that add up to ``target``.

    Where another symmetry ties columns together, the smallest solution leaves them out.
    """
    sizes = {leg: float(column.norm()) for leg, column in columns.items()}
    size = float(target.norm())
    alive = [leg for leg in columns if sizes[leg] > NOISE**2 * max(sizes.values())]
    if not alive or not size > NOISE**2 * max(sizes.values()):
        return Sum(set(), set(), 1.0)
    matrix = torch.stack([columns[leg] / sizes[leg] for leg in alive], -1)
    unit = (target / size)[:, None]
    found = torch.linalg.lstsq(matrix, unit, rcond=1e-11, driver="gelsd").solution
    missing = float((matrix @ found - unit).norm())
    shares = {leg: float(x) * size / sizes[leg] for leg, x in zip(alive, found, strict=True)}
    ones = {leg for leg, share in shares.items() if abs(share - 1) < 1e-3}
    zeros = {leg for leg, share in shares.items() if abs(share) < 1e-3}
    return Sum(ones, set(alive) - ones - zeros, missing)


def _norm(name: str, module: nn.Module) -> Norm | None:
    """A norm with a scale, if the module computes one: kind and offset are tried out."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    kinds: tuple[NormKind, ...] = ("rms", "layer")
    for kind, offset in product(kinds, (0.0, 1.0)):
        try:
            check_norms([(FoldedNorm(name, offset, kind, weight.numel()), module)])
        except Exception:  # another kind, or no norm at all
            continue
        return Norm(offset, kind, weight.numel())
    return None


def _sites(model: nn.Module) -> dict[str, Site]:
    """Name of a parameter, biases apart → its site, where something is known of its dimensions."""
    sites: dict[str, Site] = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        for holder in (owner, name) if leaf == "weight" else (name,):
            if name not in sites:
                with suppress(ValueError):  # a module of another form, unknown dimensions
                    sites |= {site.weight: site for site in find_sites(model, [holder]).values()}
    biases = {site.bias for site in sites.values()}
    return {name: site for name, site in sites.items() if name not in biases}


def _recorder(name: str, into: dict[str, Tensor]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        into[f"{name}.input"] = next(iter((*args, *kwargs.values())))
        into[f"{name}.output"] = output

    return record
