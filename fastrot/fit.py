"""Whether a plan fits a model: everything that is checked before a plan is carried out."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from fastrot.checks import (
    AlreadyRotatedError,
    check_flag,
    check_loaded,
    check_model,
    check_overlaps,
    check_parameter,
)
from fastrot.edits import Plan, Rotate, Scale, WeightEdit
from fastrot.errors import RotationError
from fastrot.foreign import check_foreign
from fastrot.index import Index, outline
from fastrot.memory import check_memory
from fastrot.norms import check_norms
from fastrot.online import check_site
from fastrot.record import applied_groups
from fastrot.resolve import on_meta
from fastrot.rotations import PERMUTATION
from fastrot.transform_config import TransformConfig
from fastrot.values import notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(model: "PreTrainedModel", plan: Plan, *, trust: bool = False) -> Plan:
    """Refuse a plan that does not fit a model, as :func:`fastrot.apply` does before it writes.

    A plan that leaves something out fits, though it may not be exact: that is decided where plans
    are made.

    Args:
        model: the model that will be rotated.
        plan: made for it, or for one with the same names and shapes.
        trust: let pass forwards and hooks of others, see :func:`fastrot.apply`.

    Returns:
        The plan, with notes on what the weights predict about precision if they are in memory.

    Raises:
        RotationError: the plan is for another model, contradicts itself, or asks for what can't be
            done with this one.
        TypeError: something that is no model, no plan or no flag.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"expected a plan that fastrot.plan made, got {type(plan).__name__}")
    check_model(model)
    return checked(Index(model), plan, trust)


def checked(index: Index, plan: Plan, trust: bool) -> Plan:
    """The rest of :func:`check`, for a model that was checked and what is a plan."""
    check_flag("trust", trust)
    check_first_time(index, plan.transform_config)
    _check_same(index, plan)
    return fitted(index, plan, trust)


def fitted(index: Index, plan: Plan, trust: bool) -> Plan:
    """The rest of it, which is all that a plan needs that was just made of a model."""
    model = index.model
    if not plan.weights and not plan.online:
        groups = ", ".join(plan.transform_config.config_groups)
        raise RotationError(
            f"transform_config describes no transform: {groups} names no place in 'apply'"
        )
    check_weights(index, plan)
    if plan.online and getattr(model, "use_kernels", False):
        raise RotationError(
            "the model uses kernels from the hub, which replace whole modules and pass by the "
            "rotations inside; call model.set_use_kernels(False) first"
        )
    loaded = not on_meta(model)
    for site in plan.online:
        if loaded:
            check_loaded(site.module, index.module(site.module))
        check_site(model, site)
    if not trust:
        check_foreign(index, plan, classes=plan.by_table)
    return replace(plan, notes=notes(index, plan)) if loaded else plan


def check_first_time(index: Index, config: TransformConfig) -> None:
    """Refuse rotations of which one is on the model already."""
    there = applied_groups(index.config)
    twice = [name for name in config.config_groups if name in there]
    moved = [name for name in twice if config.config_groups[name].type == PERMUTATION]
    if twice and moved == twice:
        raise AlreadyRotatedError(
            f"the channels of this {index.class_name} have changed places already "
            f"({' and '.join(moved)}); leave permutations out, their order stays"
        )
    if twice:
        raise AlreadyRotatedError(
            f"{' and '.join(twice)} is already on this {index.class_name}; a second time "
            "would undo or scramble it; start from the original weights, or, where the "
            "weights are new and only the configuration is that of a rotated model, make the model "
            "from a copy of it without its record (del config.fastrot)"
        )


def check_weights(index: Index, plan: Plan) -> None:
    """Refuse weights that the plan can't be carried out on, and steps that don't fit them."""
    parameters = index.parameters
    seen: set[str] = set()
    for edit in plan.weights:
        if edit.parameter in seen:
            raise RotationError(f"the plan has two edits of {edit.parameter}; join their steps")
        seen.add(edit.parameter)
        for problem in _misfits(edit, parameters):
            raise RotationError(f"the plan does not fit {edit.parameter}: {problem}")
    if on_meta(index.model):
        return
    check_norms((norm, index.module(norm.name)) for norm in plan.norms if norm.kind != "scale")
    for name in plan.parameters:
        check_parameter(name, parameters[name])
    check_overlaps(index.model, plan.parameters)
    check_memory((name, parameters[name]) for name in plan.parameters)


def _check_same(index: Index, plan: Plan) -> None:
    model, parameters = index.model, index.parameters
    if type(model).__name__ != plan.model_class:
        raise RotationError(
            f"the plan was made for a {plan.model_class}, not for a {type(model).__name__}; plan "
            "this model"
        )
    for name, shape in plan.shapes.items():
        there = tuple(parameters[name].shape) if name in parameters else None
        if there != shape:
            what = "has none of that name" if there is None else f"has it as {there}"
            raise RotationError(
                f"the plan writes {name} of shape {shape}, but this {type(model).__name__} {what}; "
                "plan this model"
            )
    for site in plan.online:
        try:
            model.get_submodule(site.module)
        except AttributeError:
            raise RotationError(
                f"the plan puts {site.group} on {site.module}, which this {type(model).__name__} "
                "does not have; plan this model"
            ) from None
    if plan.outline != outline(index):
        raise RotationError(
            f"the plan was made for a {plan.model_class} with other parameters, or tied in "
            "another way, than this one; plan this model"
        )


def _misfits(edit: WeightEdit, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    shape = tuple(parameters[edit.parameter].shape)
    for step in edit.steps:
        if not max(0, len(shape) - 2) <= step.dim < len(shape):
            yield f"{step} acts on dimension {step.dim} of {shape}"
        elif isinstance(step, Scale):
            norm = parameters.get(step.norm)
            if norm is None or tuple(norm.shape) != (shape[step.dim],):
                there = "no parameter" if norm is None else f"of shape {tuple(norm.shape)}"
                yield f"{step}: {step.norm} is {there}, expected ({shape[step.dim]},)"
        elif isinstance(step, Rotate):
            size = step.rotation.size
            if step.part is None and size != shape[step.dim]:
                yield f"{step} is of size {size}, its dimension {shape[step.dim]}"
            elif step.part is not None:
                groups, length = step.part.groups, shape[step.dim]
                taken = size + step.part.behind
                if step.part.size != size or length % groups or taken > length // groups:
                    yield f"{step} does not fit {groups} parts of {length}"
