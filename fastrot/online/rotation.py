"""The module that rotates activations."""

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.rotation import Rotation

INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


class OnlineRotation(nn.Module):
    """Rotates the last dimension of its input: ``x → x Q``, or ``x Qᵀ``.

    Args:
        site: the rotation, its direction and the precision.
        device: where the operand lies; ``meta`` while a checkpoint is being loaded.
        dtype: of the activations to come; a random matrix is kept in it, but at least in float32.

    What defines the rotation is a buffer of integers (signs, or the bits of a dense matrix): it is
    saved with the model, and no ``model.to(dtype)`` rounds it.
    """

    operand: Tensor | None

    def __init__(self, site: OnlineSite, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.rotation: Rotation = site.rotation
        self.inverse = site.inverse
        self.group = site.group
        self.dtype = site.dtype
        self.stored = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("operand", self._operand(device))

    def _operand(self, device: torch.device) -> Tensor | None:
        rotation = self.rotation
        if device.type == "meta" and rotation.kind == "random-matrix":
            shape = (rotation.block, rotation.block)
            return torch.empty(shape, dtype=INTEGERS[self.stored], device=device)
        operand = rotation.operand
        if operand is None or rotation.kind == "random-hadamard":
            return None if operand is None else operand.to(device, copy=True)
        return operand.to(self.stored).view(INTEGERS[self.stored]).to(device, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x``, ``(..., size)`` of any floating dtype; the result has the same."""
        operand = self.operand
        if operand is not None and operand.dtype != torch.int8:
            operand = operand.view(self.stored)
        wide = x.to(torch.float64) if self.dtype == torch.float64 else x
        return self.rotation.apply(wide, inverse=self.inverse, operand=operand).to(x.dtype)

    def extra_repr(self) -> str:
        """Group, rotation and direction, for ``print(model)``."""
        return f"{self.group}{', inverse' if self.inverse else ''}, {self.rotation}"
