"""Both sides of a weight by torch: dense matrices, other devices, and transposed memory."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from fastrot.edits import Rotate
from fastrot.kernels.weight import Workspace
from fastrot.rotation import Rotation

CHUNK_BYTES = 1 << 26
"""What a rotation takes at a time: its temporaries are a few times as large."""


class TorchRotation:
    """Rotations along the columns (left) and the rows (right) of matrices of one shape.

    Args:
        like: ``(rows, cols)``, floating point.
        left: in their order.
        right: likewise.
        gamma: ``(cols,)`` that multiplies before, or None.
        row_gamma: ``(rows,)``, likewise.
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
        left: Sequence[Rotate],
        right: Sequence[Rotate],
        gamma: Tensor | None,
        row_gamma: Tensor | None,
        dtype: torch.dtype,
    ):
        self.shape, self.dtype = like.shape, dtype
        self._gamma, self._row_gamma = gamma, row_gamma
        self._steps = [
            (dim, step.rotation, step.inverse, _operand(step.rotation, like.device))
            for dim, step in chain(((1, s) for s in right), ((0, s) for s in left))
        ]
        self.scratch = like.numel() * dtype.itemsize
        self.kind = (
            (like.shape, like.device, dtype),
            tuple((dim, str(rotation), inverse) for dim, rotation, inverse, _ in self._steps),
        )

    def run(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Write the rotated ``source`` into ``target``, which may be the same."""
        work = workspace.matrix(self.shape, self.dtype)
        work.copy_(source)
        if self._gamma is not None:
            work *= self._gamma
        if self._row_gamma is not None:
            work *= self._row_gamma[:, None]
        for dim, rotation, inverse, operand in self._steps:
            for chunk in self._chunks(work, dim):
                chunk.copy_(rotation.apply(chunk, dim, inverse=inverse, operand=operand))
        target.copy_(work)

    def rehearse(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Compile kernels and touch the memory of temporaries, on a first chunk of nothing."""
        work = workspace.matrix(self.shape, self.dtype).zero_()
        for dim, rotation, inverse, operand in self._steps:
            chunk = self._chunks(work, dim)[0]
            rotation.apply(chunk, dim, inverse=inverse, operand=operand)

    def _chunks(self, work: Tensor, dim: int) -> tuple[Tensor, ...]:
        width = max(1, CHUNK_BYTES // (work.shape[dim] * work.element_size()))
        return work.split(width, dim=1 - dim)


def _operand(rotation: Rotation, device: torch.device) -> Tensor | None:
    return None if rotation.operand is None else rotation.operand.to(device)
