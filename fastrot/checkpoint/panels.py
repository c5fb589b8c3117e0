"""Panels of a task: how many rows at a time, in how much memory, and what is done to them."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrot.checkpoint.header import ALIGNED
from fastrot.checkpoint.tasks import Task
from fastrot.edits import Rotate, Scale
from fastrot.fuse.torch_weight import TorchRotation
from fastrot.fuse.writes import Write, as_written, scale_of, scales_of, writes_of
from fastrot.kernels.weight import Workspace
from fastrot.values import check_converted, check_not_lost, check_rotated

Norms = Mapping[str, Tensor]
"""The weights of folded norms by the names of the model."""


def panels_of(task: Task, most: int) -> list[slice]:
    """Ranges of the first dimension of about ``most`` bytes, that can be worked on one by one.

    A dimension along which something is rotated is not cut, nor one that boxes cut.
    """
    shape = task.source.shape
    if not shape or not task.source.nbytes:
        return [slice(0, shape[0] if shape else 1)]
    row = task.source.nbytes // shape[0]
    count = max(1, most // row) if task.free else shape[0]
    return [slice(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


class Panel:
    """Some rows of a task.

    Args:
        task: what is done.
        rows: of the first dimension.

    Attributes:
        read: where its bytes lie in the source: start and length.
        wrote: where those of the result lie.
        nbytes: of memory for both; one place serves both if they have one dtype.
    """

    def __init__(self, task: Task, rows: slice):
        self.task, self.rows = task, rows
        shape = task.source.shape
        self._shape = (rows.stop - rows.start, *shape[1:]) if shape else ()
        row = prod(shape[1:])
        start, count = row * rows.start, prod(self._shape)
        stored, other = task.stored, task.layout.dtype
        self._dtype = torch.float32 if task.coded else stored.dtype
        size = stored.nbytes // max(1, stored.shape[0] if shape else 1)
        self.read = size * rows.start, size * (rows.stop - rows.start)
        self.wrote = start * other.itemsize, count * other.itemsize
        # Codes, numbers and result lie one after the other, as far as they are not the same.
        self._numbers = _aligned(self.read[1]) if task.coded else 0
        self._result = self._numbers
        if self._dtype != other:
            self._result += _aligned(count * self._dtype.itemsize)
        self.nbytes = max(self.read[1], self._result + self.wrote[1])

    @property
    def acts(self) -> bool:
        """Whether anything happens to it on its way."""
        return bool(self.task.actions) or self._result > 0

    def result(self, memory: Tensor) -> Tensor:
        """The bytes of the result in ``memory``, ``(nbytes,)`` uint8."""
        return memory[self._result : self._result + self.wrote[1]]

    def writes(self, memory: Tensor, norms: Norms) -> list[Write]:
        """What the kernels do to it, prepared."""
        x, y = self._views(memory)
        scales = scales_of(norms.__getitem__)
        return [
            write
            for action in self.task.actions
            if action.edit is not None
            for write in writes_of(
                scales, self._box(x, action.box), self._box(y, action.box), action.edit
            )
        ]

    def rotate(self, memory: Tensor, norms: Norms, workspace: Workspace) -> None:
        """Do all that the task asks for, on the device where the memory lies.

        Args:
            memory: holds the source's bytes, and takes the result's.
            norms: the weights of folded norms.
            workspace: memory of the kernels; it grows if that is not enough.

        Raises:
            ValueRangeError: the result is not finite, or float16 loses it.
        """
        with as_written():
            x, y = self._views(memory)
            if self.task.coded is not None:
                stored = self.task.stored
                codes = memory[: self.read[1]].view(stored.dtype).view(-1, *stored.shape[1:])
                self.task.coded.decode(codes, x, self.rows.start)
            if y is not x:
                y.copy_(x)
            writes = self.writes(memory, norms)
            workspace.reserve(
                max((w.rotation.scratch for w in writes), default=0),
                max((w.rotation.panel for w in writes), default=0),
            )
            for action in self.task.actions:
                scales = action.edit.scales if action.edit else ()
                if action.edit and scales and y.dtype == torch.float16 and y.dim() > 1:
                    factors = [scale_of(norms.__getitem__, scale) for scale in scales]
                    check_not_lost(action.edit, self._box(y, action.box), factors)
            for rotation, source, target in writes:
                rotation.run(source, target, workspace)
            for action in self.task.actions:
                if action.edit is None:
                    self._box(y, action.box).fill_(action.value)
                else:
                    check_rotated(action.edit, self._box(y, action.box))
            if y is not x:
                check_converted(self.task.name, x, y)

    def _views(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers before and after, which may be the same memory."""
        y = self.result(memory).view(self.task.layout.dtype).view(self._shape)
        if self._result == self._numbers:
            return y, y
        end = self._numbers + prod(self._shape) * self._dtype.itemsize
        return memory[self._numbers : end].view(self._dtype).view(self._shape), y

    def _box(self, x: Tensor, box: tuple[slice, ...]) -> Tensor:
        return x if self.task.free else x[box]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


class Room(NamedTuple):
    """Bytes that the rotation of one panel after the other takes.

    Attributes:
        panel: of the largest panel.
        scratch: of the kernels' scratch memory, for any of the panels.
        matrices: of dense matrices that are copied to a device for a panel.
    """

    panel: int
    scratch: int
    matrices: int

    @property
    def kernels(self) -> int:
        """All but the panel."""
        return self.scratch + self.matrices

    @property
    def least(self) -> int:
        """All together."""
        return self.panel + self.kernels


def needs(tasks: Iterable[Task], norms: Norms, most: int, apart: bool = False) -> Room:
    """What panels take.

    Args:
        tasks: what will be done.
        norms: the weights of folded norms.
        most: bytes of a panel of what may be cut.
        apart: whether it is done on a device with memory of its own. What its kernels take is
            found without it, so it is the most that they may take.
    """
    widest = 0
    rooms: dict[Any, tuple[int, int]] = {}
    for task in tasks:
        panel = Panel(task, panels_of(task, most)[0])
        widest = max(widest, panel.nbytes)
        edits = [(action.box, action.edit) for action in task.actions if action.edit]
        kind = [
            (() if task.free else box, [_kind(step) for step in edit.steps]) for box, edit in edits
        ]
        key = (
            panel.rows.stop,
            task.source.shape[1:],
            task.source.dtype,
            task.layout.dtype,
            str(kind),
        )
        if edits and key not in rooms:
            # Memory that is never touched.
            writes = panel.writes(torch.empty(panel.nbytes, dtype=torch.uint8), norms)
            rooms[key] = _apart(writes) if apart else (max(w.rotation.scratch for w in writes), 0)
    scratch, matrices = zip((0, 0), *rooms.values(), strict=True)
    return Room(widest, max(scratch), max(matrices))


def _apart(writes: list[Write]) -> tuple[int, int]:
    scratch = max(write.source.numel() * write.rotation.dtype.itemsize for write in writes)
    rotations = {id(write.rotation): write.rotation for write in writes}.values()
    return scratch, sum(r.matrices for r in rotations if isinstance(r, TorchRotation))


def _kind(step: Scale | Rotate) -> object:
    return (str(step), step.part) if isinstance(step, Rotate) else step.dim
