"""Mapping, configuration and model → :class:`~fastrot.edits.Plan`. Reads, never writes."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import nn
from transformers import PreTrainedModel

from fastrot.checks import check_linear, check_norm, check_overlaps, check_parameter
from fastrot.edits import NormReset, OnlineSite, Plan, Rotate, Scale, WeightEdit
from fastrot.mapping import Mapping, NormMapping
from fastrot.patterns import NoMatchError, find_modules, matches, no_match_message
from fastrot.rotation import Rotation
from fastrot.transform_config import (
    ATTENTION_LOCATIONS,
    FUSED_LOCATIONS,
    TransformArgs,
    TransformConfig,
    TransformScheme,
)


class UncoveredParameterError(ValueError):
    """Parameters of which the mapping does not say what they do with the residual stream."""


def resolve(
    model: PreTrainedModel,
    config: TransformConfig,
    norms: Sequence[NormMapping],
    seed: int,
    mapping: Mapping | None = None,
    dtype: torch.dtype = torch.float64,
) -> Plan:
    """The plan of a configuration.

    Args:
        model: any decoder whose linears are ``nn.Linear``.
        config: the rotations.
        norms: the norms that are folded into a reader once a fused rotation acts on its input.
        seed: of random rotations.
        mapping: if given and ``config`` has a group R1, every parameter must have a role in it.
        dtype: of the arithmetic on weights.

    Raises:
        ValueError: anything that can't be done, naming the thing, its value and the way out.
    """
    rotates = _fused_steps(model, config, seed)
    scales, resets = _norm_steps(model, config, norms)
    edits = [
        WeightEdit(
            parameter=name,
            steps=(*scales.get(name, ()), *rotates.get(name, ())),
            dtype=dtype,
        )
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name in rotates or name in scales
    ]
    sites = resolve_online(model, config, seed)
    if mapping is not None and "R1" in config.config_groups:
        _check_one_stream(edits)
        _check_coverage(model, mapping, norms, edits)
    edits = _untie(model, mapping, edits)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = (*(e.parameter for e in edits), *(r.parameter for r in resets))
    for name in names:
        check_parameter(name, parameters[name])
    check_overlaps(model, names)
    return Plan(
        model_class=type(model).__name__,
        edits=tuple(edits),
        resets=tuple(resets),
        sites=tuple(sites),
        transform_config=config,
        seed=seed,
        shapes={name: tuple(parameters[name].shape) for name in names},
    )


def resolve_online(model: PreTrainedModel, config: TransformConfig, seed: int) -> list[OnlineSite]:
    """The online part alone; needs the names and sizes of modules, no weights."""
    sites = []
    for group, scheme, args, name, module in _places(model, config, online=True):
        size = _online_size(name, module, args.location)
        sites.append(
            OnlineSite(
                module=name,
                location=args.location,
                rotation=_rotation(group, scheme, name, size, seed),
                inverse=args.inverse,
                group=group,
                dtype=scheme.precision,
            )
        )
    taken: dict[tuple[str, str], str] = {}
    for site in sites:
        other = taken.setdefault((site.module, site.location), site.group)
        if other != site.group:
            raise ValueError(
                f"{site.group} and {other} both act on the {site.location} of {site.module}; "
                "give each place one online transform"
            )
    return sites


def head_dim_of(model: PreTrainedModel, mapping: Mapping) -> int:
    """Size of one value head: the mapping's, the attention module's or the configuration's.

    Raises:
        ValueError: none of them has it, or layers differ.
    """
    if mapping.attn_head_dim is not None:
        return mapping.attn_head_dim
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    found = {
        getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        for module in find_modules(model, mapping.attn).values()
    }
    if len(found) != 1 or not isinstance(size := found.pop(), int):
        raise ValueError(
            f"the head size of {type(model).__name__} is not one number ({found}); "
            "set attn_head_dim in mappings"
        )
    return size


def _places(
    model: PreTrainedModel, config: TransformConfig, online: bool
) -> Iterable[tuple[str, TransformScheme, TransformArgs, str, nn.Module]]:
    for group, scheme in config.config_groups.items():
        for args in scheme.apply:
            if (args.location not in FUSED_LOCATIONS) == online:
                for name, module in find_modules(model, args.targets, args.ignore).items():
                    yield group, scheme, args, name, module


def _fused_steps(
    model: PreTrainedModel, config: TransformConfig, seed: int
) -> dict[str, tuple[Rotate, ...]]:
    steps: dict[str, tuple[Rotate, ...]] = defaultdict(tuple)
    for group, scheme, args, name, module in _places(model, config, online=False):
        check_linear(group, name, module)
        dim = 1 if args.location == "weight_input" else 0
        if isinstance(module, nn.Embedding):
            if dim == 1:
                raise ValueError(f"{group}: {name} is an embedding, it has no weight_input")
            dim = 1
        size = model.get_parameter(f"{name}.weight").shape[dim]
        rotation = _rotation(group, scheme, name, size, seed)
        inverse = args.inverse != (args.location == "weight_input")
        steps[f"{name}.weight"] += (Rotate(dim, rotation, inverse, group),)
        if args.location == "weight_output" and getattr(module, "bias", None) is not None:
            steps[f"{name}.bias"] += (Rotate(0, rotation, inverse, group),)
    return steps


def _rotation(group: str, scheme: TransformScheme, name: str, size: int, seed: int) -> Rotation:
    kind, label = scheme.type, group
    if scheme.randomize:
        # One fixed matrix can't differ between layers: give each its signs.
        kind = "random-hadamard" if kind == "hadamard" else kind
        label = f"{group}.{_layer(name)}"
    try:
        return Rotation(kind, size, scheme.head_dim, seed, label)  # type: ignore[arg-type]
    except ValueError as error:
        raise type(error)(f"{group} of {name}: {error}") from None


def _layer(name: str) -> str:
    """``layers.3`` of any module inside that layer, whatever the model around it is called."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[max(index - 1, 0) : index + 1])


def _online_size(name: str, module: nn.Module, location: str) -> int:
    if location in ATTENTION_LOCATIONS:
        size = getattr(module, "head_dim", None)
        if not isinstance(size, int):
            raise ValueError(f"{name} ({type(module).__name__}) has no head_dim to rotate")
        return size
    attribute = "in_features" if location == "input" else "out_features"
    size = getattr(module, attribute, None)
    if not isinstance(size, int):
        raise ValueError(
            f"{location} transform: {name} ({type(module).__name__}) is no nn.Linear, "
            "so the size of the rotation is unknown"
        )
    return size


def _norm_steps(
    model: PreTrainedModel, config: TransformConfig, norms: Sequence[NormMapping]
) -> tuple[dict[str, tuple[Scale, ...]], list[NormReset]]:
    """Fold every norm of which at least one reader's input is rotated by a fused transform."""
    online = {
        name for *_, args, name, _ in _places(model, config, True) if args.location == "input"
    }
    rotated = {
        name
        for *_, args, name, _ in _places(model, config, False)
        if args.location == "weight_input" and name not in online
    }
    scales: dict[str, tuple[Scale, ...]] = {}
    resets = []
    for mapping in norms:
        readers = find_modules(model, mapping.linears, missing_ok=True)
        if mapping.norm is None or not rotated.intersection(readers):
            continue
        found = find_modules(model, (mapping.norm,))
        norm_of = {reader: _nearest(reader, found) for reader in readers}
        for norm, module in found.items():
            own = [reader for reader in readers if norm_of[reader] == norm]
            if not own:
                raise ValueError(f"norm {norm} feeds none of {', '.join(mapping.linears)}")
            if not rotated.intersection(own):
                continue
            check_norm(norm, module, mapping.offset)
            for reader in own:
                weight = f"{reader}.weight"
                if weight in scales:
                    raise ValueError(
                        f"{reader} reads two norms, {scales[weight][0].norm} and {norm}.weight; "
                        "give it one in norm_mappings"
                    )
                scales[weight] = (Scale(1, f"{norm}.weight", mapping.offset),)
            resets.append(NormReset(f"{norm}.weight", 1.0 - mapping.offset))
    return scales, resets


def _nearest(reader: str, norms: Iterable[str]) -> str:
    """The norm that shares most leading name parts with the reader."""
    parts, everywhere = reader.split("."), list(norms)
    if "." in (layer := _layer(reader)) and layer.split(".")[-1].isdigit():
        norms = [n for n in norms if _layer(n) == layer or not _layer(n).split(".")[-1].isdigit()]
        if not norms:
            raise ValueError(
                f"no norm in the layer of {reader} (norm_mappings names {_some(everywhere)}); "
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


def _check_one_stream(edits: Iterable[WeightEdit]) -> None:
    sizes: dict[int, str] = {}
    for edit in edits:
        for step in edit.steps:
            if isinstance(step, Rotate) and step.group == "R1":
                sizes.setdefault(step.rotation.size, edit.parameter)
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise ValueError(
            f"R1 must act on one residual stream, but {first} has size {a} and {second} {b} there"
        )


def _check_coverage(
    model: PreTrainedModel,
    mapping: Mapping,
    norms: Sequence[NormMapping],
    edits: Iterable[WeightEdit],
) -> None:
    """Every parameter is rotated, a folded norm, the bias of a reader, or explicitly ignored."""
    edited = {e.parameter for e in edits if any(isinstance(s, Rotate) for s in e.steps)}
    folded = {s.norm for edit in edits for s in edit.steps if isinstance(s, Scale)}
    fed = {name for m in norms for name in find_modules(model, m.linears)}
    readers = find_modules(
        model,
        (*mapping.attn_q, *mapping.attn_k, *mapping.attn_v, *mapping.mlp_in, *mapping.lm_head),
    )
    without = sorted(set(readers) - fed)
    if without:
        raise UncoveredParameterError(
            f"no norm mapping feeds {_some(without)}; name its norm in norm_mappings "
            "(NormMapping(norm=None, …) if it reads the stream as it is)"
        )
    biases = {f"{name}.bias" for name in readers}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in mapping.ignore:
        if not any(matches(name, pattern) for name in names):
            raise NoMatchError(no_match_message(model, pattern, names))
    known = edited | folded | biases
    leftover = [
        name
        for name in names
        if name not in known and not any(matches(name, pattern) for pattern in mapping.ignore)
    ]
    if leftover:
        raise UncoveredParameterError(
            f"the mapping does not say how {_some(leftover)} of {type(model).__name__} meets the "
            "residual stream; add it to a role or, if it does not, to Mapping.ignore"
        )


def check_heads(model: PreTrainedModel, mapping: Mapping, head_dim: int) -> None:
    """Refuse R2 unless every attention block has one value and one output projection to rotate."""
    blocks = find_modules(model, mapping.attn)
    values, outputs = find_modules(model, mapping.attn_v), find_modules(model, mapping.attn_o)
    for block, module in blocks.items():
        own = [[n for n in names if n.startswith(f"{block}.")] for names in (values, outputs)]
        if [len(names) for names in own] != [1, 1]:
            raise ValueError(
                f"R2: {block} needs one attn_v and one attn_o in mappings, "
                f"found {own[0]} and {own[1]}"
            )
        actual = getattr(module, "head_dim", head_dim)
        if actual != head_dim:
            raise ValueError(
                f"R2: {block} has heads of size {actual}, mappings says attn_head_dim={head_dim}"
            )
    if len(values) != len(blocks) or len(outputs) != len(blocks):
        stray = [n for n in (*values, *outputs) if n.rpartition(".")[0] not in blocks]
        raise ValueError(f"R2: {_some(stray)} is in no attention block that attn names")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


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
