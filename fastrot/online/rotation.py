"""The module that rotates activations."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.kernels import hadamard_transform
from fastrot.online.operands import UNSAID, damage, difference, stored, value_of
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

    The operand is a buffer of integers (:func:`fastrot.online.operands.stored`). It is saved with
    the model, no ``model.to(dtype)`` rounds it, loading such a state into a model without the
    rotation fails for its name, and into one with another rotation for its values.
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
        self.register_buffer("operand", stored(site.rotation, site.inverse, device))

    @property
    def value(self) -> Tensor | None:
        """The operand as :meth:`fastrot.Rotation.apply` takes it."""
        return value_of(self.rotation, self.operand)

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

    def held(self) -> Tensor:
        """The operand, from where accelerate keeps it if it was offloaded."""
        hook = vars(self).get("_hf_hook")
        for inner in (hook, *getattr(hook, "hooks", ())):
            kept = getattr(inner, "weights_map", None)
            if self.operand.is_meta and kept is not None:
                offloaded: Tensor = kept["operand"]
                return offloaded
        return self.operand

    def problem(self) -> str | None:
        """Why the operand is not the one that this rotation should have, in words."""
        operand, rotation = self.held(), self.rotation
        return damage(rotation, operand) or difference(rotation, self.inverse, operand)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        """As every module's, but an operand that would make this another rotation is an error."""
        name, errors = f"{prefix}operand", lists[-1]
        given = state_dict.get(name)
        if isinstance(given, Tensor):
            if (wrong := damage(self.rotation, given)) is not None:
                errors.append(
                    f"{name}, the operand of {self.group}, {wrong}; load the state as it was "
                    "saved: cast, scale or average its other entries, not 'fastrot_*'"
                )
                return
            if (wrong := difference(self.rotation, self.inverse, given, self.operand)) is not None:
                errors.append(
                    f"{name}, the operand of {self.group} ({self.rotation}), {wrong}: the state is "
                    "of a model that was rotated otherwise; load it into one with the same recipe "
                    "and seed"
                )
                return
            if given.dtype == UNSAID and not self.rotation.has_operand:
                said = stored(self.rotation, self.inverse, given.device)
                state_dict = {**state_dict, name: said}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def extra_repr(self) -> str:
        """Group, rotation and direction, for ``print(model)``."""
        return f"{self.group}{', inverse' if self.inverse else ''}, {self.rotation}"
