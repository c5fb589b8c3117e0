"""``fastrot.remove``: take online rotations off again, and keep the function."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastrot.checks import check_adapters, check_flag, check_kind
from fastrot.damage import mark_damaged
from fastrot.edits import Plan, Rotate, WeightEdit
from fastrot.errors import RotationError
from fastrot.fit import check_weights
from fastrot.foreign import check_whole
from fastrot.fuse import Fusion
from fastrot.index import Index
from fastrot.integrations.marks import unmark
from fastrot.journal import Journal, Undo, exclusive
from fastrot.mapping import STREAM, NormMapping
from fastrot.memory import on_cpu
from fastrot.online import installed, rotation_at, uninstall
from fastrot.record import applications, ordered, own_config, retrace, sealed, without_groups
from fastrot.resolve import resolve
from fastrot.rotations import MATRIX, Rotation
from fastrot.rows import known_norms
from fastrot.transform_config import TransformConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode(False)
def remove(
    model: "PreTrainedModel",
    groups: str | Iterable[str] | None = None,
    *,
    trust: bool = False,
    undo: Undo = "none",
) -> None:
    """Take online rotations off a model; it goes on computing the same function.

    R3 has no counterpart in the weights and leaves without a trace; that of latent attention is
    fused, and stays as R1 and R2 do. R4 has one: the down
    projections are rotated back, which rounds them once more. R1 and R2 stay fused, unless R1 has
    an online part (``keep_head``, norms that write into the residual stream) and is named: then all
    its weights are rotated back, and its norms stay folded.

    Args:
        model: rotated by :func:`fastrot.apply`, or loaded from such a checkpoint.
        groups: names of the rotations to take off, for example ``"R4"``; default, all that are
            online but R1, and R2 where it is in the weights of some layers and online in others.
        trust: let other models that share a part with this one be changed with it.
        undo: copies of the weights, as for :func:`fastrot.apply`.

    Raises:
        RotationError: a group that is not online on this model, one whose rotation is not the
            recorded one, or whose weights were rotated on the same side again by another one,
            so that it can't be undone alone; a part of a larger model, or one that shares a part
            with another; or a model with adapters. The model is untouched then; after other errors
            as for :func:`fastrot.apply`.
        TypeError: no model of transformers itself, or ``groups`` that are no names.
    """
    check_kind(model)
    check_flag("trust", trust)
    check_whole(model, trust=trust)
    with exclusive(model), on_cpu():
        _remove(model, groups, undo)


def _remove(model: "PreTrainedModel", groups: str | Iterable[str] | None, undo: Undo) -> None:
    check_adapters(model)
    matrices = {
        Rotation.from_matrix(online.value.cpu(), fixes_ones=online.rotation.fixes_ones)
        for _, _, online in installed(model)
        if online.rotation.kind == MATRIX and online.value is not None
    }
    index = Index(model)
    norms = known_norms(index)
    plans = [
        (
            name,
            resolve(
                index,
                TransformConfig({name: scheme}),
                norms if name == STREAM else (),  # of which it rotated the biases
                seed,
                given=matrices,
            ),
        )
        for seed, config in applications(getattr(model, "config", None))
        for name, scheme in config.config_groups.items()
    ]
    online = [name for name, plan in plans if plan.online]
    given = _names(groups)
    by_case = {name.upper(): name for name in online}
    # Values that some layers turn online (Gemma 4) were turned in the weights of others.
    others = [
        name
        for name, plan in plans
        if name in online and name != STREAM and not _turns_outputs(plan, name)
    ]
    wanted = others if given is None else [by_case.get(name.upper(), name) for name in given]
    missing = [name for name in wanted if name not in online]
    if missing or not wanted:
        none = "no rotation is online" if given is None else "groups is empty and names no rotation"
        what = f"{' and '.join(missing)} is not online" if missing else none
        there = ", ".join(online) or "none"
        raise RotationError(f"{what} on this {type(model).__name__} (online: {there})")
    if STREAM in wanted and any(s.rotation.fixes_ones for s in dict(plans)[STREAM].online):
        _check_described(model, norms)
    _check_commutes(plans, wanted, ordered(model.config))
    _check_known(plans, wanted)
    for name, plan in plans:
        if name in wanted:
            check_weights(index, plan)
            _check_installed(model, plan)
    fusion = Fusion(index, _inverse([plan for name, plan in plans if name in wanted]))
    lost = partial(mark_damaged, model, fusion.parameters)
    with Journal(fusion.overwritten, undo, lost) as journal:
        config = own_config(model, journal)
        uninstall(model, wanted, journal)
        config.fastrot = sealed(without_groups(config, wanted), model)
        if not any(True for _ in installed(model)):
            unmark(config)
        retrace()
        fusion.run(journal)


def _names(groups: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if groups is None:
        return None
    names = (groups,) if isinstance(groups, str) or not isinstance(groups, Iterable) else (*groups,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"groups must be names of rotations such as 'R4', got {groups!r}")
    return names


def _check_described(model: "PreTrainedModel", norms: Sequence[NormMapping]) -> None:
    if not norms:
        raise RotationError(
            f"R1 rotated the biases of the LayerNorms of this {type(model).__name__}, which "
            "fastrot's table does not list, so they can't be rotated back; start from the original "
            "weights"
        )


def _check_installed(model: "PreTrainedModel", plan: Plan) -> None:
    """What is on the model must be what the record says: its inverse goes into the weights."""
    for site in plan.online:
        module = rotation_at(model, site)
        expected = site.rotation.operand
        if module is None or module.rotation != site.rotation:
            raise RotationError(
                f"the record names {site.group} on the {site.location} of {site.module}, but it is "
                "not installed there; load the checkpoint with from_pretrained, or call "
                "fastrot.restore(model)"
            )
        value = module.value
        if expected is not None and (
            value is None or not torch.equal(value.to(expected.device), expected)
        ):
            raise RotationError(
                f"{site.group} of {site.module} is another rotation than its recorded seed makes; "
                "it can't be taken out of the weights"
            )


def _inverse(plans: list[Plan]) -> Plan:
    """What takes the rotations of all plans back, the last one first, with one rounding."""
    edits: dict[str, WeightEdit] = {}
    for edit in (edit for plan in reversed(plans) for edit in plan.weights):
        back = (replace(s, inverse=not s.inverse) for s in edit.steps if isinstance(s, Rotate))
        before = edits.get(edit.parameter, replace(edit, steps=()))
        edits[edit.parameter] = replace(before, steps=(*before.steps, *reversed(list(back))))
    return replace(plans[0], weights=tuple(edits.values()), norms=(), online=())


def _turns_outputs(plan: Plan, name: str) -> bool:
    places = plan.transform_config.config_groups[name].apply
    return any(args.location == "weight_output" for args in places)


def _check_known(plans: list[tuple[str, Plan]], wanted: list[str]) -> None:
    """What is taken out of weights must be there; only online rotations bring theirs along."""
    for name, plan in plans:
        for edit in plan.weights if name in wanted else ():
            if any(isinstance(s, Rotate) and not s.rotation.known for s in edit.steps):
                raise RotationError(
                    f"{name} can't be taken off: of its matrix in {edit.parameter} the model has "
                    "the digest alone; start from the original weights"
                )


def _check_commutes(plans: list[tuple[str, Plan]], wanted: list[str], ordered: bool) -> None:
    """What is taken off must have come last, wherever it acts."""
    sides: dict[tuple[str, int], str] = {}
    for name, plan in plans:
        for edit in plan.weights:
            for step in edit.steps:
                if not isinstance(step, Rotate):
                    continue
                side = edit.parameter, step.dim
                other, sides[side] = sides.get(side, name), name
                late = other in wanted and name not in wanted
                unsure = not ordered and (other in wanted or name in wanted)
                if other != name and (late or unsure):
                    raise RotationError(
                        f"{other} and {name} both rotated dimension {step.dim} of "
                        f"{edit.parameter}; {other} can't be taken off alone"
                    )
