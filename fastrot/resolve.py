"""Mapping, configuration and model → :class:`~fastrot.edits.Plan`. Reads, never writes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch
from torch import nn
from transformers import PreTrainedModel

from fastrot.checks import check_norm, check_overlaps, check_parameter
from fastrot.coverage import check_coverage, check_one_stream, some
from fastrot.edits import NormReset, OnlineSite, Plan, Rotate, Scale, WeightEdit
from fastrot.heads import KEY_NAMES, head_size, value_part
from fastrot.mapping import Mapping, NormMapping
from fastrot.patterns import find_modules
from fastrot.rotation import Rotation
from fastrot.sites import Site, find_sites
from fastrot.transform_config import (
    ATTENTION_LOCATIONS,
    FUSED_LOCATIONS,
    TransformArgs,
    TransformConfig,
    TransformScheme,
)


@dataclass
class _Steps:
    """What happens to each parameter, while it is being worked out.

    Attributes:
        scales: parameter → norms that are folded into it.
        rotates: parameter → its rotations.
        inputs: name of a reader → the fused rotations of its input.
        resets: norms that become scale-free.
    """

    scales: dict[str, tuple[Scale, ...]] = field(default_factory=dict)
    rotates: dict[str, tuple[Rotate, ...]] = field(default_factory=lambda: defaultdict(tuple))
    inputs: dict[str, tuple[Rotate, ...]] = field(default_factory=lambda: defaultdict(tuple))
    resets: list[NormReset] = field(default_factory=list)


def resolve(
    model: PreTrainedModel,
    config: TransformConfig,
    norms: Sequence[NormMapping],
    seed: int,
    mapping: Mapping | None = None,
    dtype: torch.dtype = torch.float64,
) -> Plan:
    """The plan of a configuration.

    A model that lies on the meta device as a whole is planned by its shapes; nothing is known of
    its values then.

    Args:
        model: any decoder.
        config: the rotations.
        norms: the norms that are folded into a reader once a fused rotation acts on its input.
        seed: of random rotations.
        mapping: if given and ``config`` has a group R1, every parameter must have a role in it.
        dtype: of the arithmetic on weights.

    Raises:
        ValueError: anything that can't be done, naming the thing, its value and the way out.
    """
    loaded = not on_meta(model)
    sites = resolve_online(model, config, seed)
    steps = _Steps()
    _rotate_sites(model, config, seed, steps)
    online = {
        name
        for *_, args in _places(config, online=True)
        if args.location == "input"
        for name in find_sites(model, args.targets, args.ignore)
    }
    _fold_norms(model, norms, online, steps, loaded)
    edits = [
        WeightEdit(
            parameter=name,
            steps=(*steps.scales.get(name, ()), *steps.rotates.get(name, ())),
            dtype=dtype,
        )
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name in steps.rotates or name in steps.scales
    ]
    if mapping is not None and "R1" in config.config_groups:
        check_one_stream(edits, sites)
        check_coverage(model, mapping, norms)
    edits = _untie(model, mapping, edits)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = (*(e.parameter for e in edits), *(r.parameter for r in steps.resets))
    if loaded:
        for name in names:
            check_parameter(name, parameters[name])
        check_overlaps(model, names)
    return Plan(
        model_class=type(model).__name__,
        edits=tuple(edits),
        resets=tuple(steps.resets),
        sites=tuple(sites),
        transform_config=config,
        seed=seed,
        shapes={name: tuple(parameters[name].shape) for name in names},
    )


def on_meta(model: nn.Module) -> bool:
    """Whether no weight is in memory, so that a model has shapes only."""
    return all(parameter.is_meta for parameter in model.parameters())


def resolve_online(model: PreTrainedModel, config: TransformConfig, seed: int) -> list[OnlineSite]:
    """The online part alone; needs the names and sizes of modules, no weights."""
    sites = [
        OnlineSite(
            module=module,
            location=location,
            rotation=_rotation(group, scheme, module, size, seed),
            inverse=args.inverse,
            group=group,
            dtype=scheme.precision,
        )
        for group, scheme, args in _places(config, online=True)
        for module, location, size in _online_places(model, group, args)
    ]
    taken: dict[tuple[str, str], str] = {}
    for site in sites:
        other = taken.setdefault((site.module, site.location), site.group)
        if other != site.group:
            raise ValueError(
                f"{site.group} and {other} both act on the {site.location} of {site.module}; "
                "give each place one online transform"
            )
    return sites


def _places(
    config: TransformConfig, online: bool
) -> Iterator[tuple[str, TransformScheme, TransformArgs]]:
    for group, scheme in config.config_groups.items():
        for args in scheme.apply:
            if (args.location not in FUSED_LOCATIONS) == online:
                yield group, scheme, args


def _online_places(
    model: PreTrainedModel, group: str, args: TransformArgs
) -> Iterator[tuple[str, str, int]]:
    """Module, location and size of every place that ``args`` name."""
    if args.location in ATTENTION_LOCATIONS:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        for name, module in find_modules(model, args.targets, args.ignore).items():
            size = head_size(module, config, KEY_NAMES)
            if size is None:
                raise ValueError(f"{name} ({type(module).__name__}) has no head_dim to rotate")
            yield name, args.location, size
        return
    if args.location == "output":
        for name, module in find_modules(model, args.targets, args.ignore).items():
            yield name, "output", _output_size(group, name, module)
        return
    for name, site in find_sites(model, args.targets, args.ignore, group=group).items():
        if site.input is None:
            raise ValueError(f"{group}: {name} is an embedding, it has no input to rotate")
        size = site.shape[site.input]
        if not site.is_bare:
            yield name, "input", size
        elif len(site.shape) == 3 and name.endswith(".down_proj"):
            yield name.rpartition(".")[0], "down_input", size
        else:
            raise ValueError(
                f"{group}: {name} is a bare parameter, the input of which no online transform can "
                "reach"
            )


def _output_size(group: str, name: str, module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return weight.numel()
    size = getattr(module, "out_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"{group}: {name} is a {type(module).__name__}; an output transform needs an "
            "nn.Linear or a norm, whose size is known"
        )
    return size


def _rotate_sites(
    model: PreTrainedModel, config: TransformConfig, seed: int, steps: _Steps
) -> None:
    for group, scheme, args in _places(config, online=False):
        bare = args.rows == "transposed"
        found = find_sites(model, args.targets, args.ignore, group=group, transposed=bare)
        for name, site in found.items():
            outwards = args.location == "weight_output"
            dim = site.output if outwards else site.input
            if dim is None:
                raise ValueError(f"{group}: {name} is an embedding, it has no weight_input")
            part = None
            if outwards and args.rows not in ("all", "transposed"):
                part = value_part(model, site, args.rows)
            size = site.shape[dim] if part is None else part.size
            rotation = _rotation(group, scheme, name, size, seed)
            inverse = args.inverse if outwards else not args.inverse
            step = Rotate(dim, rotation, inverse, group, part)
            _add(steps, site.weight, step)
            if not outwards:
                steps.inputs[name] += (step,)
            elif site.bias is not None:
                _add(steps, site.bias, replace(step, dim=max(len(site.shape) - 2, 0)))


def _add(steps: _Steps, parameter: str, step: Rotate) -> None:
    old = [s for s in steps.rotates[parameter] if s.dim == step.dim]
    if old and (step.part or any(s.part for s in old)):
        raise ValueError(
            f"{old[0].group} and {step.group} act on the same dimension of {parameter}, one on "
            "its values only; apply them one after the other"
        )
    steps.rotates[parameter] += (step,)


def _rotation(group: str, scheme: TransformScheme, name: str, size: int, seed: int) -> Rotation:
    kind, label = scheme.type, group
    if scheme.randomize:
        # One fixed matrix can't differ between layers: give each its signs.
        kind = "random-hadamard" if kind == "hadamard" else kind
        label = f"{group}.{_layer(name)}"
    try:
        return Rotation(
            kind,  # type: ignore[arg-type]
            size,
            scheme.head_dim,
            seed,
            label,
            scheme.fixes_ones,
        )
    except ValueError as error:
        raise type(error)(f"{group} of {name}: {error}") from None


def _layer(name: str) -> str:
    """``layers.3`` of any module inside that layer, whatever the model around it is called."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[max(index - 1, 0) : index + 1])


def _fold_norms(
    model: PreTrainedModel,
    norms: Sequence[NormMapping],
    online: set[str],
    steps: _Steps,
    loaded: bool,
) -> None:
    """Fold every norm of which at least one reader's input is rotated by a fused transform."""
    rotated = {name for name in steps.inputs if name not in online}
    for mapping in norms:
        readers = find_sites(model, mapping.linears, missing_ok=True)
        touched = rotated.intersection(readers)
        if not touched:
            continue
        if mapping.kind == "layer":
            for name in sorted(touched):
                _check_centred(name, steps.inputs[name])
        if mapping.norm is None:
            continue
        found = find_modules(model, (mapping.norm,))
        norm_of = {reader: _nearest(reader, found) for reader in readers}
        for norm, module in found.items():
            own = [reader for reader in readers if norm_of[reader] == norm]
            if not own:
                raise ValueError(f"norm {norm} feeds none of {', '.join(mapping.linears)}")
            if not rotated.intersection(own):
                continue
            if loaded:
                check_norm(norm, module, mapping.offset, mapping.kind, _width(readers[own[0]]))
            if getattr(module, "weight", None) is None:
                continue
            for reader in own:
                site = readers[reader]
                turns = steps.inputs.get(reader)
                dim = turns[0].dim if turns else site.input
                if dim is None:
                    raise ValueError(f"{reader} is an embedding and can't read the norm {norm}")
                if site.weight in steps.scales:
                    raise ValueError(
                        f"{reader} reads two norms, {steps.scales[site.weight][0].norm} and "
                        f"{norm}.weight; give it one in norm_mappings"
                    )
                scale = Scale(dim, f"{norm}.weight", mapping.offset)
                steps.scales[site.weight] = (scale,)
            if getattr(module, "bias", None) is not None:
                _fold_bias(norm, mapping.offset, own, steps)
            steps.resets.append(NormReset(f"{norm}.weight", 1.0 - mapping.offset))


def _width(reader: Site) -> int:
    return reader.shape[-1 if reader.input is None else reader.input]


def _check_centred(name: str, turns: Sequence[Rotate]) -> None:
    for turn in turns:
        if not turn.rotation.fixes_ones:
            raise ValueError(
                f"{turn.group}: {name} reads a LayerNorm, which centres; only a rotation with "
                "fixes_ones commutes with it"
            )


def _fold_bias(norm: str, offset: float, readers: Sequence[str], steps: _Steps) -> None:
    """``β → (β / γ) Q``: the readers take the scale, and read the bias through it."""
    turns = {
        tuple(replace(turn, dim=0) for turn in steps.inputs.get(reader, ())) for reader in readers
    }
    if len(turns) != 1:
        raise ValueError(
            f"{norm} has a bias, so all its readers must be rotated alike: {some(readers)}"
        )
    steps.scales[f"{norm}.bias"] = (Scale(0, f"{norm}.weight", offset, inverse=True),)
    steps.rotates[f"{norm}.bias"] += turns.pop()


def _nearest(reader: str, norms: Iterable[str]) -> str:
    """The norm that shares most leading name parts with the reader."""
    parts, everywhere = reader.split("."), list(norms)
    if "." in (layer := _layer(reader)) and layer.split(".")[-1].isdigit():
        norms = [n for n in norms if _layer(n) == layer or not _layer(n).split(".")[-1].isdigit()]
        if not norms:
            raise ValueError(
                f"no norm in the layer of {reader} (norm_mappings names {some(everywhere)}); "
                "give it its own"
            )
    pairs = {norm: zip(norm.split("."), parts, strict=False) for norm in norms}
    shared = {n: len([*takewhile(lambda ab: ab[0] == ab[1], p)]) for n, p in pairs.items()}
    best = max(shared.values())
    nearest = [norm for norm, count in shared.items() if count == best]
    if len(nearest) > 1:
        raise ValueError(
            f"{reader} could read {nearest[0]} or {nearest[1]}; make the norm pattern narrower"
        )
    return nearest[0]


def _untie(
    model: PreTrainedModel, mapping: Mapping | None, edits: Sequence[WeightEdit]
) -> list[WeightEdit]:
    """Split tied parameters whose edits differ, if they are embedding and head; refuse others."""
    tied: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].append(name)
    by_name = {edit.parameter: edit for edit in edits}
    heads = _heads(model, mapping)
    for names in tied.values():
        first, *others = names
        if not others or not any(name in by_name for name in names):
            continue
        steps = [by_name[name].steps if name in by_name else () for name in names]
        if all(other == steps[0] for other in steps):
            for name in others:
                del by_name[name]
        elif len(others) == 1 and others[0] in heads:
            known = next(by_name[name] for name in names if name in by_name)
            by_name[others[0]] = replace(known, parameter=others[0], steps=steps[1], source=first)
        else:
            raise ValueError(
                f"{first} and {others[0]} share one tensor but need different edits; "
                "give one of them a copy of its own first"
            )
    return list(by_name.values())


def _heads(model: PreTrainedModel, mapping: Mapping | None) -> set[str]:
    if mapping is not None:
        return {f"{name}.weight" for name in find_modules(model, mapping.lm_head, missing_ok=True)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}
