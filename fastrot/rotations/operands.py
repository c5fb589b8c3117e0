"""What defines a rotation besides its order: seeded signs, random matrices, given ones."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrot.errors import RotationError

ORTHOGONAL = 1e-12
"""Largest entry of ``QᵀQ - I`` in float64 of a matrix that counts as orthogonal."""


def seeded_signs(name: str, order: int) -> Tensor:
    """Signs ``(order,)`` int8: bits of SHAKE-256, so that no library version can change them."""
    bits = np.frombuffer(_key(name, order).digest((order + 7) // 8), dtype=np.uint8)
    return torch.from_numpy(1 - 2 * np.unpackbits(bits)[:order].astype(np.int8))


def random_matrix(name: str, order: int, fixes_ones: bool = False) -> Tensor:
    """Uniform over the orthogonal group, or its part that fixes the ones; float64.

    It comes from a QR decomposition (Stewart, "The efficient generation of random orthogonal
    matrices", 1980), whose last digits depend on the machine.
    """
    generator = np.random.default_rng(int.from_bytes(_key(name, order).digest(16), "little"))
    inner = order - fixes_ones
    q, r = torch.linalg.qr(torch.from_numpy(generator.standard_normal((inner, inner))))
    q = q * r.diagonal().sign()
    return _bordered(q) if fixes_ones else q


def given_matrix(matrix: Tensor, fixes_ones: bool = False) -> Tensor:
    """A float64 copy on the CPU of a matrix that is what it should be.

    Raises:
        RotationError: ``|QᵀQ - I|`` has an entry above 1e-12, or the ones are not fixed.
        TypeError: no floating-point tensor.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        what = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"a rotation needs a floating-point matrix, got {what}")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise RotationError(f"a rotation needs a square matrix, got {tuple(matrix.shape)}")
    _check_plain(matrix)
    q = matrix.detach().to("cpu", torch.float64, copy=True).contiguous()
    error = float((q.T @ q - torch.eye(len(q), dtype=q.dtype)).abs().max())
    if not error <= ORTHOGONAL:
        raise RotationError(
            f"the matrix of order {len(q)} is not orthogonal, |QᵀQ - I| reaches {error:.1e}, "
            f"more than {ORTHOGONAL:g}; orthogonalise it in float64, by its QR decomposition "
            "or U Vᵀ of its singular value decomposition"
        )
    if fixes_ones and not float((q.sum(0) - 1).abs().max()) <= 1e-10:
        raise RotationError(
            f"the matrix of order {len(q)} does not map the all-ones vector to itself, as a "
            "model with LayerNorm needs it"
        )
    return q


def _check_plain(given: Tensor) -> None:
    if given.is_meta or given.layout != torch.strided:
        kind = "on the meta device, without numbers" if given.is_meta else str(given.layout)
        raise TypeError(f"a rotation needs a plain tensor, got one that is {kind}")


def given_order(order: Any) -> Tensor:
    """An int64 copy on the CPU of a permutation.

    Raises:
        RotationError: it does not name every number below its length once.
        TypeError: something else than whole numbers.
    """
    numbers = torch.as_tensor(order)
    if numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.dim() != 1:
        raise TypeError(
            f"a permutation is a row of whole numbers, got {tuple(numbers.shape)} {numbers.dtype}"
        )
    _check_plain(numbers)
    made = numbers.detach().to("cpu", torch.int64, copy=True).contiguous()
    if not len(made) or not torch.equal(made.sort().values, torch.arange(len(made))):
        raise RotationError(
            f"a permutation of {len(made)} must name every number from 0 to {len(made) - 1} once"
        )
    return made


def digest(matrix: Tensor) -> str:
    """Of a float64 matrix, or of an order, on the CPU, to tell whether two are one."""
    return hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()


def _key(name: str, order: int) -> Any:
    return hashlib.shake_256(f"fastrot:{name}:{order}".encode())


def _bordered(q: Tensor) -> Tensor:
    """The orthogonal matrix that fixes the ones and acts as ``q`` on their complement."""
    n = len(q) + 1
    # The reflection that exchanges the first unit vector and the normalised ones.
    v = torch.full((n,), -(n**-0.5), dtype=q.dtype)
    v[0] += 1
    if n > 1:
        v /= v.norm()
    reflection = torch.eye(n, dtype=q.dtype) - 2 * torch.outer(v, v)
    return reflection @ torch.block_diag(torch.ones(1, 1, dtype=q.dtype), q) @ reflection
