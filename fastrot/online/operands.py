"""What an online rotation saves of itself, and whether what is loaded is that."""

import torch
from torch import Tensor

from fastrot.rotations import MATRIX, Rotation, digest

UNSAID = torch.int8
"""Type of the markers that were written before they said anything; each is a single 1."""


def stored(rotation: Rotation, inverse: bool, device: torch.device) -> Tensor:
    """What is saved, all of integers, so that no cast to another floating-point type rounds it.

    The signs, ``(b,)`` int8; the bits of a float64 matrix, ``(b, b)`` int64; or a marker for
    ``hadamard``, which needs neither: ``b``, or ``-b`` of the transpose, ``(1,)`` int32.
    """
    if rotation.dense and (device.type == "meta" or not rotation.known):
        # Loading fills it; zeros are no rotation, and refused.
        return torch.zeros((rotation.block, rotation.block), dtype=torch.int64, device=device)
    operand = rotation.operand
    if operand is None:
        block = -rotation.block if inverse else rotation.block
        return torch.tensor([block], dtype=torch.int32, device=device)
    if operand.dtype == torch.float64:
        operand = operand.contiguous().view(torch.int64)
    return operand.to(device, copy=True)


def value_of(rotation: Rotation, operand: Tensor) -> Tensor | None:
    """What is saved, as :meth:`fastrot.Rotation.apply` takes it."""
    if not rotation.has_operand:
        return None
    return operand.view(torch.float64) if rotation.dense else operand


def damage(rotation: Rotation, operand: Tensor) -> str | None:
    """Why this is the operand of no rotation of that kind and order, in words."""
    block = rotation.block
    kind: tuple[torch.dtype, tuple[int, ...]] = torch.int8, (block,)
    if rotation.dense:
        kind = torch.int64, (block, block)
    elif not rotation.has_operand:
        kind = UNSAID if operand.dtype == UNSAID else torch.int32, (1,)
    if (operand.dtype, tuple(operand.shape)) != kind:
        return f"is {operand.dtype} {tuple(operand.shape)}, not {kind[0]} {kind[1]}"
    if not _has_values(operand) or _is_rotation(rotation, operand):
        return None
    return "is missing, or damaged"


def difference(
    rotation: Rotation, inverse: bool, operand: Tensor, held: Tensor | None = None
) -> str | None:
    """What makes an undamaged operand that of another rotation, in words.

    Args:
        rotation: whose operand it should be.
        inverse: whether that is transposed.
        operand: what is asked about.
        held: the operand in whose place it comes; a random matrix is compared with nothing else.
    """
    if not _has_values(operand):
        return None
    if not rotation.has_operand:
        said = int(stored(rotation, inverse, torch.device("cpu")))
        if operand.dtype == UNSAID or int(operand) == said:
            return None
        return f"says {int(operand)}, not {said} (block size, negative where transposed)"
    if rotation.kind == MATRIX:
        same = digest(operand.view(torch.float64).cpu()) == rotation.label
        return None if same else "is not the recorded matrix"
    if not rotation.dense:
        signs = rotation.operand
        assert signs is not None
        same = torch.equal(operand.cpu(), signs)
        return None if same else f"is not what its recorded seed {rotation.seed} makes"
    # What memory without values holds is no rotation.
    if held is None or not _has_values(held) or not _is_rotation(rotation, held):
        return None
    here, there = (part.cpu().view(torch.float64) for part in (held, operand))
    # The last digits of a random matrix depend on the machine that made it.
    same = torch.allclose(here, there, rtol=0, atol=1e-6)
    return None if same else "is not the matrix that is there"


def _has_values(operand: Tensor) -> bool:
    """Not on the meta device; what is distributed, or is being traced, is not looked into."""
    return type(operand) is Tensor and not operand.is_meta


def _is_rotation(rotation: Rotation, operand: Tensor) -> bool:
    if not rotation.dense:
        signs = rotation.has_operand or operand.dtype == UNSAID
        return bool((operand.abs() == 1).all()) if signs else bool((operand != 0).all())
    matrix = operand.view(torch.float64)
    x = torch.randn(1, len(matrix), generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(matrix.device, torch.float64)
    return abs(float((x @ matrix).norm() / x.norm()) - 1) < 1e-6
