"""``Rotation``: an orthogonal matrix, described instead of materialised."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastrot.hadamard import factors, hadamard_matrix
from fastrot.kernels import hadamard_transform

RotationKind = Literal["hadamard", "random-hadamard", "random-matrix"]
KINDS: tuple[RotationKind, ...] = get_args(RotationKind)


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``Q = I ⊗ B`` of order ``size``, with equal diagonal blocks ``B``.

    ``B`` is ``H/√b`` (``hadamard``), ``D·H/√b`` with seeded signs ``D`` (``random-hadamard``), or
    distributed uniformly over the orthogonal group (``random-matrix``; Stewart, "The efficient
    generation of random orthogonal matrices", 1980). The inverse is always the transpose.

    Attributes:
        kind: one of the three above.
        size: order of ``Q``.
        block_size: order ``b`` of ``B``; None means ``size``.
        seed: the source of all randomness, together with ``label``.
        label: distinguishes rotations of one seed, for example ``"R2.model.layers.3"``.

    Raises:
        ValueError: an unknown kind, a block size that does not divide, or an order for which no
            Hadamard matrix is known (:class:`fastrot.hadamard.HadamardSizeError`).
    """

    kind: RotationKind
    size: int
    block_size: int | None = None
    seed: int = 0
    label: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rotation kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.size < 1:
            raise ValueError(f"rotation size {self.size} is not positive")
        if self.block < 1 or self.size % self.block:
            raise ValueError(f"block_size={self.block_size} does not divide {self.size}")
        if self.kind != "random-matrix":
            factors(self.block)

    @property
    def block(self) -> int:
        """Order of the diagonal blocks."""
        return self.size if self.block_size is None else self.block_size

    @cached_property
    def operand(self) -> Tensor | None:
        """What defines the block besides its order, on the CPU.

        None for ``hadamard``; the signs, ``(b,)`` int8, for ``random-hadamard``; the block itself,
        ``(b, b)`` float64, for ``random-matrix``. The signs are bits of SHAKE-256 over seed, label
        and order, so that no library version can change them; the random matrix comes from a QR
        decomposition, whose last digits depend on the machine.
        """
        if self.kind == "hadamard":
            return None
        key = hashlib.shake_256(f"fastrot:{self.seed}:{self.label}:{self.block}".encode())
        if self.kind == "random-hadamard":
            digest = np.frombuffer(key.digest((self.block + 7) // 8), dtype=np.uint8)
            bits = np.unpackbits(digest)[: self.block]
            return torch.from_numpy(1 - 2 * bits.astype(np.int8))
        generator = np.random.default_rng(int.from_bytes(key.digest(16), "little"))
        gaussian = torch.from_numpy(generator.standard_normal((self.block, self.block)))
        q, r = torch.linalg.qr(gaussian)
        return q * r.diagonal().sign()

    def apply(
        self,
        x: Tensor,
        dim: int = -1,
        *,
        inverse: bool = False,
        operand: Tensor | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Multiply the vectors of ``x`` along ``dim`` from the right: ``v → v Q``, or ``v → v Qᵀ``.

        Args:
            x: any shape with ``x.shape[dim] == size``; floating point.
            dim: where the vectors lie.
            inverse: multiply by the transpose.
            operand: :attr:`operand` as it lies on the device of ``x``; default, copied there.
            impl: as for :func:`fastrot.hadamard_transform`; without meaning for ``random-matrix``.

        Returns:
            A new tensor like ``x``.

        Raises:
            ValueError: the dimension has another size.
        """
        if x.shape[dim] != self.size:
            raise ValueError(
                f"rotation of size {self.size} cannot act on dimension {dim} of {tuple(x.shape)}"
            )
        if operand is None and self.operand is not None:
            operand = self.operand.to(x.device)
        if self.kind != "random-matrix":
            return hadamard_transform(
                x,
                self.block**-0.5,
                dim=dim,
                block_size=self.block,
                signs=operand,
                transpose=inverse,
                impl=impl,
            )
        assert operand is not None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        matrix = operand.to(dtype)
        vectors = x.to(dtype).movedim(dim, -1).unflatten(-1, (-1, self.block))
        rotated = vectors @ (matrix.T if inverse else matrix)
        return rotated.flatten(-2).movedim(-1, dim).to(x.dtype)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense matrix ``Q``, ``(size, size)``, on the CPU."""
        if self.kind == "random-matrix":
            assert self.operand is not None
            block = self.operand
        else:
            block = torch.from_numpy(hadamard_matrix(self.block)).to(torch.float64)
            block = block * self.block**-0.5
            if self.operand is not None:
                block = self.operand[:, None] * block
        return torch.block_diag(*[block] * (self.size // self.block)).to(dtype)

    def __str__(self) -> str:
        """Short form for tables, for example ``hadamard 2048`` or ``hadamard 32x64``."""
        blocks = self.size // self.block
        return f"{self.kind} {self.size}" if blocks == 1 else f"{self.kind} {blocks}x{self.block}"
