"""Online rotations where tensor parallelism gives a process a part of the channels.

Equal blocks are rotated alike wherever they lie, so a process that has whole ones needs no other.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.hadamard import block_sizes
from fastrot.rotations import Rotation

if TYPE_CHECKING:  # it imports much, and is there wherever a model is distributed
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def width_of(tensor: Any, dim: int) -> int:
    """How many entries of a dimension the first process has."""
    width: int = tensor.shape[dim]
    if not is_distributed(tensor):
        return width
    for count, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_shard(dim % tensor.dim()):
            width = -(-width // count)
    return width


def check_width(name: str, group: str, rotation: Rotation, width: int) -> None:
    """Refuse a part of the channels that would cut a block in two.

    Args:
        name: of the module that reads the channels.
        group: of the rotation.
        rotation: acts on all channels.
        width: how many of them a process has.

    Raises:
        RotationError: names block sizes that work.
    """
    if width % rotation.block:
        sizes = ", ".join(map(str, sorted(block_sizes(width))))
        raise RotationError(
            f"{group} of {name} has blocks of {rotation.block}, which do not divide the {width} of "
            f"its {rotation.size} inputs that a process of tensor parallelism has; rotate with "
            f"block_size={{{group!r}: n}}, n one of {sizes}, or do without tensor parallelism"
        )


def check_part(name: str, group: str, rotation: Rotation, x: Tensor, weight: Any, dim: int) -> None:
    """Refuse an input that is no part of the channels, or that cuts a block in two.

    Args:
        name: of the module that reads the input, for errors.
        group: of the rotation.
        rotation: acts on all channels.
        x: what is to be rotated; its last dimension is not that of the rotation.
        weight: of the module.
        dim: where the weight has its inputs.

    Raises:
        RotationError: the module has all channels, or the input is another one.
    """
    width = width_of(weight, dim) if isinstance(weight, Tensor) else rotation.size
    if width == rotation.size or x.shape[-1] > width:
        raise RotationError(
            f"{group} of {name} rotates {rotation.size} channels, and got {tuple(x.shape)}"
        )
    check_width(name, group, rotation, width)


def input_dim(module: nn.Module) -> int:
    """Where the weight of a linear module has its inputs."""
    return 0 if type(module).__name__ == "Conv1D" else 1
