"""Both sides of a weight by torch: dense matrices, other devices, and transposed memory."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from fastrot.edits import Rotate
from fastrot.kernels.weight import Workspace

CHUNK_BYTES = 1 << 26
"""What a rotation takes at a time: its temporaries are a few times as large."""


class TorchRotation:
    """Rotations along the columns (left) and the rows (right) of matrices of one shape.

    Args:
        like: ``(rows, cols)``, floating point.
        left: rotations, and diagonals ``(rows,)`` in ``dtype``, in their order.
        right: likewise, ``(cols,)``.
        dtype: float64 or float32, of every intermediate.

    Attributes:
        scratch: bytes that a run needs, the matrix in ``dtype``.
        kind: equal where the same kernels run on as much memory.
        panel: 0, see :class:`fastrot.kernels.cpu_weight.MatrixRotation`.
    """

    panel = 0

    def __init__(
        self,
        like: Tensor,
        left: Sequence[Rotate | Tensor],
        right: Sequence[Rotate | Tensor],
        dtype: torch.dtype,
    ):
        self.shape, self.dtype = like.shape, dtype
        self._steps = [
            (dim, step, _operand(step, like.device))
            for dim, step in chain(((1, s) for s in right), ((0, s) for s in left))
        ]
        self.scratch = like.numel() * dtype.itemsize
        described = (
            (dim, str(step) if isinstance(step, Rotate) else "diagonal")
            for dim, step, _ in self._steps
        )
        self.kind = (like.shape, like.device, dtype), tuple(described)

    def run(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Write the rotated ``source`` into ``target``, which may be the same."""
        work = workspace.matrix(self.shape, self.dtype)
        work.copy_(source)
        for dim, step, operand in self._steps:
            if not isinstance(step, Rotate):
                work *= step if dim else step[:, None]
                continue
            for chunk in self._chunks(work, dim):
                chunk.copy_(step.rotation.apply(chunk, dim, inverse=step.inverse, operand=operand))
        target.copy_(work)

    def rehearse(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Compile kernels and touch the memory of temporaries, on a first chunk of nothing."""
        work = workspace.matrix(self.shape, self.dtype).zero_()
        for dim, step, operand in self._steps:
            if isinstance(step, Rotate):
                chunk = self._chunks(work, dim)[0]
                step.rotation.apply(chunk, dim, inverse=step.inverse, operand=operand)

    def _chunks(self, work: Tensor, dim: int) -> tuple[Tensor, ...]:
        width = max(1, CHUNK_BYTES // (work.shape[dim] * work.element_size()))
        return work.split(width, dim=1 - dim)


def _operand(step: Rotate | Tensor, device: torch.device) -> Tensor | None:
    operand = step.rotation.operand if isinstance(step, Rotate) else None
    return None if operand is None else operand.to(device)
