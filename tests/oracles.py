"""What is right: exact transforms in float64, and correct rounding."""

import numpy as np
import torch
from torch import Tensor

from fastrot.hadamard import base_matrix, factors


def halves(n: int) -> tuple[Tensor, Tensor]:
    """P, Q with H_n = P ⊗ Q, both dense float64 and of similar order."""
    bases, power = factors(n)
    atoms = [*bases, *[2] * (power.bit_length() - 1)]
    first, second = np.ones((1, 1)), np.ones((1, 1))
    while atoms:
        if len(first) <= len(second):
            first = np.kron(first, base_matrix(atoms.pop(0)))
        else:
            second = np.kron(base_matrix(atoms.pop()), second)
    return torch.from_numpy(first), torch.from_numpy(second)


def transformed(
    x: Tensor,
    block: int,
    signs: Tensor | None = None,
    *,
    scale: float | None = None,
    transpose: bool = False,
    dim: int = -1,
) -> Tensor:
    """``scale · (x D) H`` or ``scale · (x Hᵀ) D`` for every block of a dimension, in float64.

    The scale makes it orthonormal unless it is given. The result lies where ``x`` does.
    """
    p, q = (h.to(x.device) for h in halves(block))
    if transpose:
        p, q = p.T, q.T
    d = torch.ones(block, device=x.device) if signs is None else signs
    d = d.to(x.device, torch.float64)
    blocks = x.double().movedim(dim, -1).unflatten(-1, (-1, block))
    blocks = blocks if transpose else blocks * d
    y = torch.einsum("...ab,ac,bd->...cd", blocks.unflatten(-1, (len(p), len(q))), p, q)
    y = y.flatten(-2) * (block**-0.5 if scale is None else scale)
    return (y * d if transpose else y).flatten(-2).movedim(-1, dim).contiguous()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def correctly_rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of ``dtype``, ties to even; torch rounds to float32 on the way."""
    best = exact.to(dtype)
    if dtype in (torch.float64, torch.float32):
        return best
    for step in (-1, 1):
        near = (best.view(torch.int16) + step).view(dtype)
        error, other = (best.double() - exact).abs(), (near.double() - exact).abs()
        even = near.view(torch.int16) % 2 == 0
        best = torch.where((other < error) | ((other == error) & even), near, best)
    return best
