"""Both sides of a weight: what is asked of the kernels of every device, and their memory."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Side(NamedTuple):
    """Orthonormal transforms of blocks of ``size`` along one dimension of a weight."""

    size: int
    signs: Tensor | None = None
    transpose: bool = False


class TwoSided(NamedTuple):
    """``w → Lᵀ (diag(row_gamma) w diag(gamma)) R``; None is the identity.

    R transforms every block of ``right.size`` columns of each row and L every block of
    ``left.size`` rows of each column, as ``hadamard_transform`` does with ``scale = size ** -0.5``.
    """

    left: Side | None = None
    right: Side | None = None
    gamma: Tensor | None = None
    row_gamma: Tensor | None = None


class Workspace:
    """All memory that rotations of weights need while they run: ask for it before the first write.

    Args:
        scratch: bytes of the largest intermediate matrix.
        panel: bytes of the largest panel of a thread.
        device: where the weights lie; panels are for the CPU.
    """

    def __init__(self, scratch: int, panel: int, device: torch.device | None = None):
        on_cpu = device is None or device.type == "cpu"
        self._device = None if on_cpu else device
        self.threads = torch.get_num_threads() if on_cpu else 0
        self.scratch = _memory(scratch, self._device)
        self.panel, self.panels = panel, np.empty(self.threads * panel, np.uint8)

    def reserve(self, scratch: int, panel: int) -> None:
        """Grow to these bytes if there are less; what was there goes first, with all it holds."""
        if scratch > len(self.scratch):
            del self.scratch
            self.scratch = _memory(scratch, self._device)
        if panel > self.panel:
            del self.panels
            self.panel, self.panels = panel, np.empty(self.threads * panel, np.uint8)

    def matrix(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The scratch memory as a matrix."""
        return self.scratch[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _memory(nbytes: int, device: torch.device | None) -> Tensor:
    if device is not None:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    # NumPy asks for huge pages: touching fresh memory costs more than the transform.
    return torch.from_numpy(np.empty(nbytes, np.uint8))
