"""Executes the edits of a plan: every weight is read once, rotated and rounded once."""

from collections.abc import Iterable
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastrot.edits import Plan, Rotate, Scale, WeightEdit
from fastrot.fuse.journal import Journal
from fastrot.rotation import Rotation

if TYPE_CHECKING:
    from fastrot.kernels.cpu import Side

    Stage = tuple[Side | None, Tensor | None]
    """A transform along one dimension, and the diagonal before it."""

CHUNK_BYTES = 1 << 26


def execute(model: nn.Module, plan: Plan, journal: Journal, progress: bool = False) -> None:
    """Write the edits and norm resets of ``plan`` into ``model``.

    Args:
        model: the model the plan was made for.
        plan: what to do.
        journal: is told of every write before it happens.
        progress: show a bar.
    """
    # Untied heads come first: they read the embedding as it was.
    edits = sorted(plan.edits, key=lambda edit: edit.source is None)
    scales = {
        step.norm: model.get_parameter(step.norm).detach().clone()
        for edit in edits
        for step in edit.steps
        if isinstance(step, Scale)
    }
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        for edit in tqdm(edits, "rotating weights", unit="weight", disable=not progress):
            source = target = model.get_parameter(edit.parameter)
            if edit.source is not None:
                target = nn.Parameter(_fresh(source), requires_grad=target.requires_grad)
                journal.replace(model, edit.parameter, target)
            else:
                journal.save(target)
            rotate_parameter(source, target, edit, scales)
        for reset in plan.resets:
            norm = model.get_parameter(reset.parameter)
            journal.save(norm)
            norm.fill_(reset.value)


def rotate_parameter(
    source: Tensor, target: Tensor, edit: WeightEdit, scales: dict[str, Tensor]
) -> None:
    """Write all factors of ``edit`` times ``source`` into ``target``, which may be the same.

    Args:
        source: ``(n,)``, ``(rows, cols)`` or ``(experts, rows, cols)``, floating point.
        target: as ``source``.
        edit: the factors, and the dtype of the arithmetic.
        scales: norm weights by name.
    """
    dims = max(source.dim(), 2)
    # A vector is a matrix of one row, and its only dimension the last.
    x, out = (t.detach().view((1,) * (dims - t.dim()) + t.shape) for t in (source, target))
    gammas = {dim: _gamma(edit, scales, dim - dims + source.dim(), x.device) for dim in range(dims)}
    rotates: dict[int, list[Rotate]] = {dim: [] for dim in range(dims)}
    for step in edit.steps:
        if isinstance(step, Rotate):
            rotates[step.dim + dims - source.dim()].append(step)
    sides = [_pieces(x.shape[dim], rotates[dim], gammas[dim]) for dim in (dims - 2, dims - 1)]
    for matrix, result in zip(*(t.view(-1, *t.shape[-2:]) for t in (x, out)), strict=True):
        for rows, left, row_gamma in sides[0]:
            for cols, right, gamma in sides[1]:
                place = rows, cols
                _rotate(matrix[place], result[place], left, right, row_gamma, gamma, edit.dtype)
    torch.autograd.graph.increment_version(target)


def _gamma(
    edit: WeightEdit, scales: dict[str, Tensor], dim: int, device: torch.device
) -> Tensor | None:
    for step in edit.steps:
        if isinstance(step, Scale) and step.dim == dim:
            gamma = scales[step.norm].to(device, edit.dtype) + step.offset
            return 1 / gamma if step.inverse else gamma
    return None


def _pieces(
    length: int, steps: list[Rotate], gamma: Tensor | None
) -> list[tuple[slice, list[Rotate], Tensor | None]]:
    """The parts of a dimension in which the same steps act, each with its steps and scales."""
    part = next((step.part for step in steps if step.part is not None), None)
    if part is None:
        return [(slice(0, length), steps, gamma)]
    whole = [step for step in steps if step.part is None]
    return [
        (piece, steps if within else whole, None if gamma is None else gamma[piece])
        for piece, within in part.pieces(length)
    ]


def _rotate(
    x: Tensor,
    out: Tensor,
    left: list[Rotate],
    right: list[Rotate],
    row_gamma: Tensor | None,
    gamma: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Rotate one matrix along its columns (left) and its rows (right), and round it once."""
    dense = any(step.rotation.kind == "random-matrix" for step in (*left, *right))
    if x.device.type == "cpu" and x.stride(-1) == out.stride(-1) == 1 and not dense:
        _rotate_in_panels(x, out, _stages(left), _stages(right), row_gamma, gamma, dtype)
        return
    work = x.to(dtype, copy=True)
    if gamma is not None:
        work *= gamma
    if row_gamma is not None:
        work *= row_gamma[:, None]
    for dim, step in chain(((1, s) for s in right), ((0, s) for s in left)):
        _rotate_in_chunks(work, dim, step.rotation, step.inverse)
    out.copy_(work)


def _stages(steps: list[Rotate]) -> list["Stage"]:
    """The transforms that make up the rotations, in their order."""
    from fastrot.kernels.cpu import Side

    stages: list[Stage] = []
    for step in steps:
        rotation = step.rotation
        if rotation.fixes_ones:
            assert rotation.operand is not None
            middle = rotation.operand.repeat(rotation.size // rotation.block)
            stages.append((Side(rotation.block, rotation.column_signs, False), None))
            stages.append((Side(rotation.block, rotation.column_signs, True), middle))
        else:
            stages.append((Side(rotation.block, rotation.operand, step.inverse), None))
    return stages


def _rotate_in_panels(
    x: Tensor,
    out: Tensor,
    left: list["Stage"],
    right: list["Stage"],
    row_gamma: Tensor | None,
    gamma: Tensor | None,
    dtype: torch.dtype,
) -> None:
    from fastrot.kernels.cpu import rotate_matrix

    passes = max(len(left), len(right), 1)
    nothing: Stage = (None, None)
    # NumPy asks for huge pages: touching fresh memory costs more than the transform.
    kind = np.float64 if dtype == torch.float64 else np.float32
    scratch = x if passes == 1 else torch.from_numpy(np.empty(x.shape, kind))
    sides = zip_longest(left or [nothing], right or [nothing], fillvalue=nothing)
    for index, (on_left, on_right) in enumerate(sides):
        rotate_matrix(
            x if index == 0 else scratch,
            out if index == passes - 1 else scratch,
            left=on_left[0],
            right=on_right[0],
            gamma=gamma if index == 0 else on_right[1],
            row_gamma=row_gamma if index == 0 else on_left[1],
            dtype=dtype,
        )


def _rotate_in_chunks(work: Tensor, dim: int, rotation: Rotation, inverse: bool) -> None:
    """Rotate a matrix along ``dim`` in place, a few rows (columns) at a time."""
    operand = None if rotation.operand is None else rotation.operand.to(work.device)
    other = 1 - dim
    width = max(1, CHUNK_BYTES // (work.shape[dim] * work.element_size()))
    chunks: Iterable[Tensor] = work.split(width, dim=other)
    for chunk in chunks:
        chunk.copy_(rotation.apply(chunk, dim, inverse=inverse, operand=operand))


def _fresh(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)
