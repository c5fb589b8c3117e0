"""The specification: a blocked Hadamard transform in plain torch operations.

No kernel imports this file and it imports no kernel. It runs on every device and is written to be
read, not to be fast.
"""

import torch
from torch import Tensor

from fastrot.hadamard import base_matrix, factors


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every intermediate: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transform(x: Tensor, out: Tensor, signs: Tensor | None, scale: float, transpose: bool) -> None:
    """Write ``scale · (x D) H`` into ``out``, or ``scale · (x Hᵀ) D`` if ``transpose``.

    Args:
        x: ``(outer, n, inner)``, floating point. Vectors lie along the middle dimension.
        out: as ``x``; rounded to its dtype once.
        signs: the diagonal of ``D``, ``(n,)`` of ±1, or None for the identity.
        scale: factor of the result, ``n ** -0.5`` makes the transform orthonormal.
        transpose: apply the transpose (the inverse, if orthonormal).

    ``H = M₁ ⊗ M₂ ⊗ … ⊗ H₂ ⊗ … ⊗ H₂`` with the factors of :func:`fastrot.hadamard.factors`: seen as
    ``(m₁, m₂, …, 2, …, 2)``, each axis of the vector meets its own small matrix (Van Loan, "The
    ubiquitous Kronecker product", 2000, section 2).
    """
    outer, n, inner = x.shape
    dtype = compute_dtype(x.dtype)
    bases, power = factors(n)
    y = x.to(dtype)
    d = None if signs is None else signs.to(device=x.device, dtype=dtype).view(1, n, 1)
    if d is not None and not transpose:
        y = y * d
    left = outer
    for m in (*bases, *[2] * (power.bit_length() - 1)):
        matrix = torch.tensor(base_matrix(m), device=x.device, dtype=dtype)
        if not transpose:
            matrix = matrix.T
        y = matrix @ y.reshape(left, m, -1)
        left *= m
    y = y.reshape(outer, n, inner) * scale
    if d is not None and transpose:
        y = y * d
    out.copy_(y)
