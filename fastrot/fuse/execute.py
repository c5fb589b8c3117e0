"""Executes the edits of a plan: every weight is read once, rotated and rounded once."""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastrot.edits import Plan, Rotate, Scale, WeightEdit
from fastrot.fuse.journal import Journal
from fastrot.rotation import Rotation

if TYPE_CHECKING:
    from fastrot.kernels.cpu import Side

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
        source: ``(out, in)`` or ``(n,)``, floating point.
        target: as ``source``.
        edit: the factors, and the dtype of the arithmetic.
        scales: norm weights by name.
    """
    gamma = None
    for step in edit.steps:
        if isinstance(step, Scale):
            gamma = scales[step.norm].to(source.device, edit.dtype) + step.offset
    rotates = [step for step in edit.steps if isinstance(step, Rotate)]
    # A bias is a matrix of one row.
    last = source.dim() - 1
    x, out = (t.detach() if last else t.detach().view(1, -1) for t in (source, target))
    by_dim = {dim: [step for step in rotates if step.dim == dim] for dim in range(source.dim())}
    right, left = by_dim[last], by_dim[0] if last else []
    dense = any(step.rotation.kind == "random-matrix" for step in rotates)
    rows = x.stride(-1) == out.stride(-1) == 1
    if x.device.type == "cpu" and rows and not dense and len(right) < 2 and len(left) < 2:
        from fastrot.kernels.cpu import rotate_matrix

        rotate_matrix(
            x,
            out,
            left=_side(left),
            right=_side(right),
            gamma=gamma,
            dtype=edit.dtype,
        )
        torch.autograd.graph.increment_version(target)
        return
    work = x.to(edit.dtype, copy=True)
    if gamma is not None:
        work *= gamma
    for dim, step in chain(((1, s) for s in right), ((0, s) for s in left)):
        _rotate_in_chunks(work, dim, step.rotation, step.inverse)
    out.copy_(work)


def _side(steps: list[Rotate]) -> "Side | None":
    from fastrot.kernels.cpu import Side

    if not steps:
        return None
    rotation = steps[0].rotation
    return Side(rotation.block, rotation.operand, steps[0].inverse)


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
