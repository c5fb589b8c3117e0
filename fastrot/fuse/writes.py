"""One weight: its edit as calls of kernels, prepared before anything is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrot.edits import Rotate, Scale, WeightEdit
from fastrot.fuse.torch_weight import TorchRotation
from fastrot.kernels import gpu_weight
from fastrot.kernels.gpu_weight import TritonRotation
from fastrot.kernels.weight import Side, TwoSided, Workspace
from fastrot.memory import on_cpu
from fastrot.rotations.stages import Matrix, Permutation, Signs, Stage, merged

if TYPE_CHECKING:  # it imports numba, and whoever only plans has no use for that
    from fastrot.kernels.cpu_weight import MatrixRotation


Norms = Callable[[str], Tensor]
"""The weight of a norm by the name of the parameter."""

Scales = Callable[[Scale, torch.dtype], Tensor]
"""The factors of a step in a dtype."""

_Step = tuple[Stage, ...] | Tensor
"""A rotation as its stages, or a diagonal as long as the dimension."""


class Write(NamedTuple):
    """A matrix, or a part of one, and what will be done to it."""

    rotation: "MatrixRotation | TritonRotation | TorchRotation"
    source: Tensor
    target: Tensor


@contextmanager
def as_written() -> Iterator[None]:
    """No gradient is recorded and nothing is cast, whatever surrounds the caller."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        on_cpu(),
    ):
        yield


def workspaces_for(writes: list[Write]) -> dict[torch.device, Workspace]:
    """One for each device, for the largest of its writes, with all kernels compiled."""
    needs: dict[torch.device, tuple[int, int]] = {}
    for rotation, x, _ in writes:
        scratch, panel = needs.get(x.device, (0, 0))
        needs[x.device] = max(scratch, rotation.scratch), max(panel, rotation.panel)
    made = {device: Workspace(*sizes, device) for device, sizes in needs.items()}
    ready: set[object] = set()
    for rotation, x, out in writes:
        if rotation.kind not in ready:
            rotation.rehearse(x, out, made[x.device])
            ready.add(rotation.kind)
    return made


def writes_of(scales: Scales, source: Tensor, target: Tensor, edit: WeightEdit) -> list[Write]:
    """All factors of ``edit``, prepared.

    Args:
        scales: makes the factors of a step, in a dtype.
        source: ``(n,)``, ``(rows, cols)`` or ``(experts, rows, cols)``, floating point.
        target: as ``source``, which it may be.
        edit: the factors, and the dtype of the arithmetic.
    """
    dims = max(source.dim(), 2)
    # A vector is a matrix of one row, and its only dimension the last.
    x, out = (t.detach().view((1,) * (dims - t.dim()) + t.shape) for t in (source, target))
    steps: dict[int, list[Rotate | Tensor]] = {dims - 2: [], dims - 1: []}
    for step in edit.steps:
        of_dim = steps[step.dim + dims - source.dim()]
        if isinstance(step, Rotate):
            of_dim.append(step)
        else:
            of_dim.append(scales(step, edit.dtype).to(x.device))
    sides = [_pieces(x.shape[dim], steps[dim]) for dim in (dims - 2, dims - 1)]
    pairs = list(zip(*(t.view(-1, *t.shape[-2:]) for t in (x, out)), strict=True))
    writes: list[Write] = []
    for rows, left in sides[0]:
        for cols, right in sides[1]:
            parts = [(matrix[rows, cols], result[rows, cols]) for matrix, result in pairs]
            # Experts lie in memory alike: what is prepared for one serves all.
            for like, like_out in parts[:1]:
                rotation = _rotation(like, like_out, left, right, edit.dtype)
                writes += [Write(rotation, *part) for part in parts]
    return writes


def scale_of(norms: Norms, step: Scale, dtype: torch.dtype = torch.float64) -> Tensor:
    """The factors of a step, one for each entry of the dimension, on the norm's device."""
    gamma = norms(step.norm).detach().to(dtype) + step.offset
    # A bias on a channel of weight zero was refused, unless it is zero as well.
    return torch.where(gamma == 0, 0.0, 1 / gamma) if step.inverse else gamma


def scales_of(norms: Norms) -> Scales:
    """Factors that several weights share, each made once."""
    return cache(partial(scale_of, norms))


def _pieces(length: int, steps: list[Rotate | Tensor]) -> list[tuple[slice, list[_Step]]]:
    """The parts of a dimension in which the same steps act, each with its steps."""
    parts = [step.part for step in steps if isinstance(step, Rotate) and step.part is not None]
    if not parts:
        return [(slice(0, length), _steps(steps, slice(0, length)))]
    return [(piece, _steps(steps, piece, within)) for piece, within in parts[0].pieces(length)]


def _steps(steps: list[Rotate | Tensor], piece: slice, within: bool = True) -> list[_Step]:
    return [
        step.stages if isinstance(step, Rotate) else step[piece]
        for step in steps
        if within or not isinstance(step, Rotate) or step.part is None
    ]


def _rotation(
    x: Tensor, out: Tensor, left: list[_Step], right: list[_Step], dtype: torch.dtype
) -> "MatrixRotation | TritonRotation | TorchRotation":
    """What does it by a kernel where there is one for this memory, else by torch."""
    given = any(isinstance(stage, Matrix | Permutation) for stage in _flat([*left, *right]))
    if x.stride(-1) == 1 and out.stride(-1) == 1 and not given:
        ways = _sides(left, x.shape[0]), _sides(right, x.shape[1])
        sides = zip_longest(*ways, fillvalue=(None, None))
        stages = [TwoSided(on_left, on_right, g, h) for (on_left, h), (on_right, g) in sides]
        stages = stages or [TwoSided()]
        if x.device.type == "cpu":
            from fastrot.kernels.cpu_weight import MatrixRotation

            return MatrixRotation(x, out, stages, dtype)
        if gpu_weight.takes(x, *(side for stage in stages for side in stage[:2])):
            return TritonRotation(x, out, stages, dtype)
    return TorchRotation(x, left, right, dtype)


def _flat(steps: list[_Step]) -> Iterator[Stage | Tensor]:
    for step in steps:
        yield from (step,) if isinstance(step, Tensor) else step


def _sides(steps: list[_Step], length: int) -> list[tuple[Side | None, Tensor | None]]:
    """The transforms that make up the steps in their order, and the diagonal before each."""
    sides: list[tuple[Side | None, Tensor | None]] = []
    diagonal: Tensor | None = None
    for stage in merged(_flat(steps)):
        if isinstance(stage, Side):
            sides.append((stage, diagonal))
            diagonal = None
            continue
        assert not isinstance(stage, Matrix | Permutation)
        values = stage.values.repeat(length // stage.block) if isinstance(stage, Signs) else stage
        diagonal = values if diagonal is None else diagonal * values
    return sides if diagonal is None else [*sides, (None, diagonal)]
