"""The module that rotates activations."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.kernels import hadamard_transform
from fastrot.online.parallel import check_width, is_distributed, width_of
from fastrot.rotations import Rotation
from fastrot.rotations.stages import multiply

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLOAT16_MAX = torch.finfo(torch.float16).max


class OnlineRotation(nn.Module):
    """Rotates the last dimension of its input: ``x → x Q``, or ``x Qᵀ``.

    Args:
        site: the rotation, its direction and the precision.
        device: where the operand lies; ``meta`` while a checkpoint is being loaded.
        child: of the module that holds it, where it acts; None for that module itself.

    The operand is a buffer of integers: the signs, the bits of a float64 matrix, or a single 1 for
    ``hadamard``, which needs none. It is saved with the model, no ``model.to(dtype)`` rounds it,
    and loading such a state into a model without the rotation fails for its name.
    """

    operand: Tensor

    def __init__(self, site: OnlineSite, device: torch.device, child: str | None = None):
        super().__init__()
        # Whoever pickles the model has the operand in the buffer.
        self.rotation: Rotation = replace(site.rotation, unit=None, given=None)
        self.inverse = site.inverse
        self.group = site.group
        self.location = site.location
        self.child = child
        self.dtype = site.dtype
        self.register_buffer("operand", self._stored(site.rotation, device))

    def _stored(self, rotation: Rotation, device: torch.device) -> Tensor:
        if rotation.dense and (device.type == "meta" or not rotation.known):
            # Loading fills it; zeros are no rotation, and refused.
            return torch.zeros((rotation.block, rotation.block), dtype=torch.int64, device=device)
        operand = rotation.operand
        if operand is None:
            return torch.ones(1, dtype=torch.int8, device=device)
        if operand.dtype == torch.float64:
            operand = operand.contiguous().view(torch.int64)
        return operand.to(device, copy=True)

    @property
    def value(self) -> Tensor | None:
        """The operand as :meth:`fastrot.Rotation.apply` takes it."""
        if not self.rotation.has_operand:
            return None
        operand = self.operand
        return operand if operand.dtype == torch.int8 else operand.view(torch.float64)

    @property
    def name(self) -> str:
        """Its name in the module that holds it."""
        return f"fastrot_{self.child}_{self.location}" if self.child else f"fastrot_{self.location}"

    def forward(self, x: Tensor, part: bool = False) -> Tensor:
        """Rotate ``x``, ``(..., size)`` of any floating dtype; the result has the same.

        Args:
            x: a DTensor may have any placement that leaves blocks whole.
            part: ``x`` has only some of the blocks, whole ones.
        """
        if type(x) is not Tensor and is_distributed(x):
            return self._distributed(x)
        width = x.shape[-1]
        if width != self.rotation.size and (not part or width % self.rotation.block):
            raise RotationError(
                f"{self.group} rotates {self.rotation.size} channels, and got {tuple(x.shape)}"
            )
        wide = x.to(torch.float64) if self.dtype == torch.float64 else x
        if self.rotation.dense or self.rotation.fixes_ones:
            y = multiply(wide, self.rotation.stages(self.value, self.inverse))
        else:  # the same without a list of stages, for which a decode step pays
            y = self._transformed(wide)
        if y.dtype != x.dtype:  # asked, since a decode step pays for a conversion that does nothing
            y = y.to(x.dtype)
        if x.dtype == torch.float16:
            # A sum may be larger than float16 holds where no term is: finite in, finite out.
            return y.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        return y

    def _transformed(self, x: Tensor) -> Tensor:
        block = self.rotation.block
        return hadamard_transform(
            x, block**-0.5, block_size=block, signs=self.value, transpose=self.inverse
        )

    def _distributed(self, x: "DTensor") -> Tensor:
        width = width_of(x, -1)
        check_width(self.child or self.name, self.group, self.rotation, width)
        return type(x).from_local(
            self(x.to_local(), part=True),
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,
            stride=x.stride(),
        )

    def is_orthogonal(self) -> bool:
        """Whether the operand keeps the length of a vector; a missing or damaged one does not."""
        if self.operand.dtype == torch.int8 and bool((self.operand.abs() != 1).any()):
            return False
        x = torch.randn(
            1, self.rotation.size, generator=torch.Generator().manual_seed(0), device="cpu"
        )
        x = x.to(self.operand.device, torch.float64)
        marker = self.rotation.has_operand or bool((self.operand == 1).all())
        return marker and abs(float(self(x).norm() / x.norm()) - 1) < 1e-6

    def extra_repr(self) -> str:
        """Group, rotation and direction, for ``print(model)``."""
        return f"{self.group}{', inverse' if self.inverse else ''}, {self.rotation}"
