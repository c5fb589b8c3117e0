"""Folding: the scale of a norm moves into its readers before these are rotated."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from torch import nn

from fastrot.coverage import some
from fastrot.edits import FoldedNorm, Rotate, Scale
from fastrot.errors import RotationError
from fastrot.index import Index, find_holders
from fastrot.mapping import NormMapping
from fastrot.norms import check_norm_form
from fastrot.resolve.places import layer_of
from fastrot.resolve.steps import Steps
from fastrot.sites import Site, find_sites


def fold_norms(
    index: Index,
    norms: Sequence[NormMapping],
    online: set[str],
    steps: Steps,
) -> None:
    """Fold every norm of which at least one reader's input is rotated by a fused transform."""
    rotated = {name for name in steps.inputs if name not in online}
    for mapping in norms:
        readers = find_sites(index, mapping.linears, missing_ok=True)
        touched = rotated.intersection(readers)
        if not touched:
            continue
        if mapping.kind == "layer":
            for name in sorted(touched):
                _check_centred(name, steps.inputs[name])
        if mapping.norm is None:
            continue
        found = find_holders(index, (mapping.norm,))
        fed = _fed(found, readers)
        for norm, module in found.items():
            own = fed[norm]
            if not own:
                raise RotationError(f"norm {norm} feeds none of {', '.join(mapping.linears)}")
            if not rotated.intersection(own):
                continue
            width = _width(readers[own[0]])
            check_norm_form(norm, module, mapping.kind, width)
            bare = isinstance(module, nn.Parameter)
            weighted = bare or getattr(module, "weight", None) is not None
            folded = FoldedNorm(norm, mapping.offset, mapping.kind, width, weighted)
            steps.norms.append(folded)
            if not weighted:
                continue
            for reader in own:
                site = readers[reader]
                turns = steps.inputs.get(reader)
                dim = turns[0].dim if turns else site.input
                if dim is None:
                    raise RotationError(f"{reader} is an embedding and can't read the norm {norm}")
                if site.weight in steps.scales:
                    raise RotationError(
                        f"{reader} reads two norms, {steps.scales[site.weight][0].norm} and "
                        f"{folded.parameter}; give it one in norm_mappings"
                    )
                scale = Scale(dim, folded.parameter, mapping.offset)
                steps.scales[site.weight] = (scale,)
            if getattr(module, "bias", None) is not None:
                _fold_bias(norm, mapping.offset, own, steps)


def _width(reader: Site) -> int:
    return reader.shape[-1 if reader.input is None else reader.input]


def _check_centred(name: str, turns: Sequence[Rotate]) -> None:
    for turn in turns:
        if not turn.rotation.fixes_ones:
            raise RotationError(
                f"{turn.group}: {name} reads a LayerNorm, which centres; only a rotation with "
                "fixes_ones commutes with it"
            )


def _fold_bias(norm: str, offset: float, readers: Sequence[str], steps: Steps) -> None:
    """``β → (β / γ) Q``: the readers take the scale, and read the bias through it."""
    turns = {
        tuple(replace(turn, dim=0) for turn in steps.inputs.get(reader, ())) for reader in readers
    }
    if len(turns) != 1:
        raise RotationError(
            f"{norm} has a bias, so all its readers must be rotated alike: {some(readers)}"
        )
    steps.scales[f"{norm}.bias"] = (Scale(0, f"{norm}.weight", offset, inverse=True),)
    steps.rotates[f"{norm}.bias"] += turns.pop()


def _fed(norms: Iterable[str], readers: Iterable[str]) -> dict[str, list[str]]:
    """Which readers each norm feeds: of those in its layer or in none, the nearest by name."""
    layers: dict[str, list[str]] = defaultdict(list)
    for norm in norms:
        layers[_layer_in(norm)].append(norm)
    fed: dict[str, list[str]] = {norm: [] for norm in norms}
    for reader in readers:
        layer = _layer_in(reader)
        near = [*layers.get(layer, ()), *layers.get("", ())] if layer else [*fed]
        if not near:
            raise RotationError(
                f"no norm in the layer of {reader} (norm_mappings names {some([*fed])}); "
                "give it its own"
            )
        fed[_nearest(reader, near)].append(reader)
    return fed


def _layer_in(name: str) -> str:
    """``layers.3`` of anything inside that layer, empty outside of all layers."""
    layer = layer_of(name)
    return layer if layer.split(".")[-1].isdigit() else ""


def _nearest(reader: str, norms: Sequence[str]) -> str:
    """The norm that shares most leading name parts with the reader."""
    parts = reader.split(".")
    pairs = {norm: zip(norm.split("."), parts, strict=False) for norm in norms}
    shared = {n: len([*takewhile(lambda ab: ab[0] == ab[1], p)]) for n, p in pairs.items()}
    best = max(shared.values())
    nearest = [norm for norm, count in shared.items() if count == best]
    if len(nearest) > 1:
        raise RotationError(
            f"{reader} could read {nearest[0]} or {nearest[1]}; make the norm pattern narrower"
        )
    return nearest[0]
