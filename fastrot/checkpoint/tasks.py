"""What becomes of every tensor of a checkpoint: the plan of a model, seen from its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastrot.checkpoint.header import CheckpointError, Entry, Layout
from fastrot.checkpoint.trace import Target, Trace, stored_names
from fastrot.checkpoint.traced import Piece
from fastrot.edits import Part, Plan, Rotate, Scale, WeightEdit
from fastrot.errors import RotationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Slices = tuple[slice, ...]


class Coded(Protocol):
    """A weight as a quantized checkpoint has it: codes, and factors of blocks of them."""

    @property
    def codes(self) -> Entry:
        """What the checkpoint has for the weight; its first dimension is the weight's."""

    @property
    def factors(self) -> Entry:
        """What they are multiplied with."""

    @property
    def numbers(self) -> Entry:
        """The weight as the model has it, where its codes lie."""

    @property
    def form(self) -> tuple[str, object]:
        """What decides about the numbers besides codes and factors, and a name for it."""

    def decode(self, codes: Tensor, out: Tensor, first: int) -> None:
        """Write the numbers of some rows, from ``first`` on, into ``out``, float32."""


@dataclass(frozen=True)
class Action:
    """What happens to a box of a tensor: an edit whose steps name the tensor's own dimensions.

    Without an edit it is filled with ``value``.
    """

    box: Slices
    edit: WeightEdit | None = None
    value: float = 0.0


@dataclass(frozen=True)
class Task:
    """One tensor of the new checkpoint.

    Attributes:
        name: its name.
        source: the tensor of the old checkpoint that it is made of.
        layout: its shape and dtype.
        actions: what happens to disjoint boxes of it; all else is copied.
        coded: makes numbers of it first, if the source is quantized.
    """

    name: str
    source: Entry
    layout: Layout
    actions: tuple[Action, ...] = ()
    coded: Coded | None = None

    @property
    def stored(self) -> Entry:
        """What is read for it."""
        return self.source if self.coded is None else self.coded.codes

    @property
    def free(self) -> bool:
        """Whether the first dimension may be cut."""
        shape = self.source.shape
        if not self.actions or not shape:
            return bool(shape)
        first = self.actions[0]  # boxes are disjoint: if one is whole, it is the only one
        whole = first.box == tuple(slice(0, n) for n in shape)
        steps = first.edit.steps if first.edit is not None else ()
        return whole and len(shape) > 1 and all(step.dim > 0 for step in steps)


def tasks_of(
    model: "PreTrainedModel",
    plan: Plan,
    made: Trace,
    entries: Mapping[str, Entry],
    dtype: torch.dtype | None = None,
    coded: Mapping[str, Coded] | None = None,
) -> tuple[list[Task], dict[str, str]]:
    """The tasks of all tensors that a model reads.

    Args:
        model: on the meta device.
        plan: for it.
        made: the way of the checkpoint into the model.
        entries: the tensors of the checkpoint.
        dtype: of floating-point tensors; None leaves them as they are, but bfloat16 for codes.
        coded: quantized weights, by their names in the model's checkpoint.

    Returns:
        The tasks, and pairs of tensors that are tied in the model and must be equal in the
        checkpoint.

    Raises:
        RotationError: something is rotated that no tensor holds as a whole.
        CheckpointError: the checkpoint lacks a tensor.
    """
    edits = {edit.parameter: edit for edit in plan.weights}
    values = {norm.parameter: norm.value for norm in plan.written_norms}
    ties = ties_of(model)
    untied = {edit.parameter: edit.source for edit in plan.weights if edit.source}
    for name in made.missing:
        if not any(other in made.targets for other in ties.get(name, ())):
            raise CheckpointError(f"the checkpoint lacks {name}, which the configuration describes")

    def edit_of(parameter: str) -> WeightEdit | None:
        others = () if parameter in untied else ties.get(parameter, ())
        return next((edits[name] for name in (parameter, *others) if name in edits), None)

    actions: dict[str, list[Action]] = {name: [] for name in entries}
    copied: dict[str, list[Action]] = {name: [] for name in entries}
    for name, target in made.targets.items():
        for piece in target.pieces:
            entry, edit = entries[piece.source], edit_of(name)
            if name in values:
                actions[piece.source].append(Action(place_of(piece, entry), value=values[name]))
            elif edit is not None:
                box = place_of(piece, entry)
                actions[piece.source].append(Action(box, _local(edit, piece, target)))
            else:
                copied[piece.source].append(Action(_around(piece, entry)))
    for name, found in actions.items():
        _check_disjoint(name, found, copied[name])

    def task(name: str, entry: Entry, found: Sequence[Action]) -> Task:
        codes = (coded or {}).get(entry.name)
        layout = _converted(entry, dtype or (torch.bfloat16 if codes else None))
        return Task(name, entry, layout, tuple(found), codes)

    tasks = [task(name, entries[name], found) for name, found in actions.items()]
    equal = {}
    fresh = {}
    for head, embedding in untied.items():
        if head in made.targets and embedding in made.targets:
            equal[_only(head, made).source] = _only(embedding, made).source
        else:
            held, new = (embedding, head) if embedding in made.targets else (head, embedding)
            fresh[new] = held
    names = stored_names(model, made, fresh)
    for new, held in fresh.items():
        piece, new_edit = _only(held, made), edit_of(new)
        entry = entries[piece.source]
        assert new_edit is not None
        action = Action(place_of(piece, entry), _local(new_edit, piece, made.targets[held]))
        tasks.append(task(names[new], entry, (action,)))
    return tasks, equal


def ties_of(model: "PreTrainedModel") -> dict[str, list[str]]:
    """Parameter → the others that are the same one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in groups.values()
        for name in names
        if len(names) > 1
    }


def _only(parameter: str, made: Trace) -> Piece:
    pieces = made.targets[parameter].pieces
    if len(pieces) != 1:
        raise RotationError(
            f"{parameter} is put together from {len(pieces)} tensors and has to be untied, which "
            "can't be done in files; load the model and use fastrot.apply"
        )
    return pieces[0]


def _converted(entry: Entry, dtype: torch.dtype | None) -> Layout:
    floating = entry.dtype.is_floating_point and dtype is not None
    return Layout(entry.shape, dtype if floating and dtype is not None else entry.dtype)


def place_of(piece: Piece, entry: Layout) -> Slices:
    """The box of a source that a piece came from.

    Raises:
        RotationError: the piece is not all of a box.
    """
    box = _around(piece, entry)
    if prod(s.stop - s.start for s in box) != prod(piece.shape):
        raise RotationError(
            f"transformers takes {piece.source} apart in steps, which can't be done to a file; "
            "load the model and use fastrot.apply"
        )
    return box


def _around(piece: Piece, entry: Layout) -> Slices:
    """The smallest box known to hold all that a piece came from."""
    box = []
    for axis, length in zip(piece.axes, entry.shape, strict=True):
        reach = sum(stride * (piece.shape[dim] - 1) for dim, stride in axis.strides)
        box.append(slice(0, length) if axis.mixed else slice(axis.start, axis.start + reach + 1))
    return tuple(box)


def _local(edit: WeightEdit, piece: Piece, target: Target) -> WeightEdit:
    """An edit of a parameter as one of the tensor that a piece of it came from."""
    steps: list[Scale | Rotate] = []
    for step in edit.steps:
        dims = [d for d, axis in enumerate(piece.axes) if axis.strides == ((step.dim, 1),)]
        ends, length = piece.box[step.dim], target.shape[step.dim]
        if len(dims) == 1 and not piece.axes[dims[0]].mixed:
            if isinstance(step, Rotate) and step.part is not None:
                inside = _inside(step, ends, length)
                if inside is None:
                    continue
                steps.append(replace(inside, dim=dims[0]))
                continue
            if ends == (0, length):
                steps.append(replace(step, dim=dims[0]))
                continue
        raise RotationError(
            f"{step} of {edit.parameter} does not fall on a whole dimension of {piece.source} in "
            "the checkpoint; load the model and use fastrot.apply"
        )
    return replace(edit, steps=tuple(steps), source=None)


def _inside(step: Rotate, ends: tuple[int, int], length: int) -> Rotate | None:
    """The step of the part of a dimension, seen from those entries of it that a piece has."""
    assert step.part is not None
    start, end = ends
    if ends == (0, length):
        return step
    rotated = [s for s, within in step.part.pieces(length) if within]
    hit = [s for s in rotated if s.start < end and s.stop > start]
    if not hit:
        return None
    part = Part(len(hit), step.part.size, max(0, end - hit[-1].stop))
    if (end - start) % len(hit) == 0:
        seen = [s for s, within in part.pieces(end - start) if within]
        if [(s.start + start, s.stop + start) for s in seen] == [(s.start, s.stop) for s in hit]:
            return replace(step, part=part)
    raise RotationError(f"{step}: the checkpoint cuts the values apart; use fastrot.apply")


def _check_disjoint(name: str, actions: Sequence[Action], copied: Sequence[Action]) -> None:
    for a, b in (*combinations(actions, 2), *product(actions, copied)):
        if all(s.start < t.stop and t.start < s.stop for s, t in zip(a.box, b.box, strict=True)):
            raise RotationError(
                f"{name} becomes a part of two parameters that are not rotated alike; load "
                "the model and use fastrot.apply"
            )
