"""From configuration, norms and mapping to the plan."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastrot.coverage import check_coverage, check_one_stream
from fastrot.edits import Plan, WeightEdit
from fastrot.index import Index, outline
from fastrot.mapping import STREAM, Mapping, NormMapping
from fastrot.resolve.norms import fold_norms
from fastrot.resolve.online import resolve_online
from fastrot.resolve.steps import Steps, rotate_sites
from fastrot.resolve.ties import untie
from fastrot.rotations import Rotation
from fastrot.transform_config import TransformConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve(
    model: "PreTrainedModel | Index",
    config: TransformConfig,
    norms: Sequence[NormMapping],
    seed: int,
    mapping: Mapping | None = None,
    dtype: torch.dtype = torch.float64,
    by_table: bool = True,
    given: Iterable[Rotation] = (),
) -> Plan:
    """The plan of a configuration, from names and shapes alone.

    Args:
        model: any decoder.
        config: the rotations.
        norms: the norms that are folded into a reader once a fused rotation acts on its input.
        seed: of random rotations.
        mapping: if given and ``config`` has a group R1, every parameter must have a role in it.
        dtype: of the arithmetic on weights.
        by_table: see :class:`~fastrot.edits.Plan`.
        given: matrices and permutations that the configuration names by their digests.

    Raises:
        ValueError: anything that can't be done, naming the thing, its value and the way out.
    """
    index = Index.of(model)
    index.units.update((rotation, rotation) for rotation in given)
    sites = resolve_online(index, config, seed)
    steps = Steps()
    rotate_sites(index, config, seed, steps)
    # Of stacked experts the site is the module around their weight.
    ends = {"input": "", "down_input": ".down_proj"}
    online = {f"{s.module}{ends[s.location]}" for s in sites if s.location in ends}
    fold_norms(index, norms, online, steps)
    edits = [
        WeightEdit(
            parameter=name,
            steps=(*steps.scales.get(name, ()), *steps.rotates.get(name, ())),
            dtype=dtype,
        )
        for name in index.parameters
        if name in steps.rotates or name in steps.scales
    ]
    if mapping is not None and STREAM in config.config_groups:
        check_one_stream(edits, sites)
        check_coverage(index, mapping, norms)
    edits = untie(index, mapping, edits)
    written = (norm.parameter for norm in steps.norms if norm.weighted)
    return Plan(
        model_class=index.class_name,
        weights=tuple(edits),
        norms=tuple(steps.norms),
        online=tuple(sites),
        transform_config=config,
        seed=seed,
        shapes={
            name: tuple(index.parameters[name].shape)
            for name in (*(edit.parameter for edit in edits), *written)
        },
        outline=outline(index),
        by_table=by_table,
    )


def on_meta(model: nn.Module) -> bool:
    """Whether no weight is in memory, so that a model has shapes only."""
    return all(parameter.is_meta for parameter in model.parameters())
