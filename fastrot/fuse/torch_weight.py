"""Both sides of a weight by torch: dense matrices, other devices, and transposed memory."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastrot.kernels.weight import Workspace
from fastrot.rotations.stages import Matrix, Stage, multiply

CHUNK_BYTES = 1 << 26
"""What a rotation takes at a time: its temporaries are a few times as large."""


class TorchRotation:
    """Rotations along the columns (left) and the rows (right) of matrices of one shape.

    Args:
        like: ``(rows, cols)``, floating point.
        left: rotations as their stages, and diagonals ``(rows,)`` in ``dtype``, in their order.
        right: likewise, ``(cols,)``.
        dtype: float64 or float32, of every intermediate.

    Attributes:
        scratch: bytes that a run needs, the matrix in ``dtype``.
        matrices: bytes of the dense ones, which lie where ``like`` does.
        kind: equal where the same kernels run on as much memory.
        panel: 0, see :class:`fastrot.kernels.cpu_weight.MatrixRotation`.
    """

    panel = 0

    def __init__(
        self,
        like: Tensor,
        left: Sequence[tuple[Stage, ...] | Tensor],
        right: Sequence[tuple[Stage, ...] | Tensor],
        dtype: torch.dtype,
    ):
        self.shape, self.dtype = like.shape, dtype
        self._steps = [
            (
                dim,
                step
                if isinstance(step, Tensor)
                else tuple(stage.to(like.device) for stage in step),
            )
            for dim, step in chain(((1, s) for s in right), ((0, s) for s in left))
        ]
        self.scratch = like.numel() * dtype.itemsize
        stages = (s for _, step in self._steps if not isinstance(step, Tensor) for s in step)
        self.matrices = sum(stage.q.nbytes for stage in stages if isinstance(stage, Matrix))
        self.kind = (like.shape, like.device, dtype), tuple(map(_described, self._steps))

    def run(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Write the rotated ``source`` into ``target``, which may be the same."""
        work = workspace.matrix(self.shape, self.dtype)
        work.copy_(source)
        for dim, step in self._steps:
            if isinstance(step, Tensor):
                work *= step if dim else step[:, None]
                continue
            for chunk in self._chunks(work, dim):
                chunk.copy_(multiply(chunk, step, dim))
        target.copy_(work)

    def rehearse(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Compile kernels and touch the memory of temporaries, on a first chunk of nothing."""
        work = workspace.matrix(self.shape, self.dtype).zero_()
        for dim, step in self._steps:
            if not isinstance(step, Tensor):
                multiply(self._chunks(work, dim)[0], step, dim)

    def _chunks(self, work: Tensor, dim: int) -> tuple[Tensor, ...]:
        width = max(1, CHUNK_BYTES // (work.shape[dim] * work.element_size()))
        return work.split(width, dim=1 - dim)


def _described(placed: tuple[int, tuple[Stage, ...] | Tensor]) -> tuple[Any, ...]:
    """Of a step in a dimension, what decides which kernels run."""
    dim, step = placed
    if isinstance(step, Tensor):
        return dim, "diagonal"
    return dim, *((type(s).__name__, s.block, getattr(s, "transpose", None)) for s in step)
