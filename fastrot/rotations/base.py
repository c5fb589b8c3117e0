"""``Rotation``: an orthogonal matrix, described instead of materialised."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastrot.errors import RotationError
from fastrot.hadamard import block_sizes, factors
from fastrot.kernels import hadamard_transform
from fastrot.rotations.operands import (
    digest,
    given_matrix,
    given_order,
    random_matrix,
    seeded_signs,
)
from fastrot.rotations.stages import (
    Hadamard,
    Matrix,
    Permutation,
    Signs,
    Stage,
    dense,
    inverted,
    multiply,
)

RotationKind = Literal["hadamard", "random-hadamard", "random-matrix", "matrix", "permutation"]
MATRIX: RotationKind = "matrix"
PERMUTATION: RotationKind = "permutation"
GIVEN = (MATRIX, PERMUTATION)
"""The kinds that only a tensor describes."""
KINDS = tuple(kind for kind in get_args(RotationKind) if kind not in GIVEN)
"""The kinds that a name and a seed describe."""


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``Q = I ⊗ B`` of order ``size``, with equal diagonal blocks ``B``.

    ``B`` is ``H/√b`` (``hadamard``), ``D·H/√b`` with seeded signs ``D`` (``random-hadamard``), or
    distributed uniformly over the orthogonal group (``random-matrix``), or given (``matrix``, see
    :meth:`from_matrix`, and ``permutation``, see :meth:`from_permutation`). The inverse is always
    the transpose.

    With ``fixes_ones`` each block maps the all-ones vector to itself, so that the rotation commutes
    with centring and thus with LayerNorm. It is ``S·H·D·Hᵀ·S/b`` then, where the signs ``S`` are
    the first column of ``H``, which make ``S·H`` map the ones to a unit vector, and ``D`` are signs
    that leave this one alone: fixed ones for ``hadamard``, seeded ones for ``random-hadamard``. A
    ``random-matrix`` is uniform among the orthogonal matrices that fix the ones.

    Attributes:
        kind: one of the five above.
        size: order of ``Q``.
        block_size: order ``b`` of ``B``; None means ``size``.
        seed: the source of all randomness, together with ``label``.
        label: distinguishes rotations of one seed, for example ``"R2.model.layers.3"``; of a given
            one its digest, by which two are equal.
        fixes_ones: map the all-ones vector to itself.
        unit: a rotation with the same block, whose operand this one shares instead of its own.
        given: the block of a ``matrix``, or the order of a ``permutation``; None where it has yet
            to be loaded.

    Raises:
        RotationError: an unknown kind, a block size that does not divide, or an order for which no
            Hadamard matrix is known (:class:`fastrot.hadamard.HadamardSizeError`).
    """

    kind: RotationKind
    size: int
    block_size: int | None = None
    seed: int = 0
    label: str = ""
    fixes_ones: bool = False
    unit: "Rotation | None" = field(default=None, compare=False, repr=False)
    given: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, *GIVEN):
            raise RotationError(f"rotation kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.size < 1:
            raise RotationError(f"rotation size {self.size} is not positive")
        if self.block < 1 or self.size % self.block:
            near = sorted(block_sizes(self.size), key=lambda size: abs(size - self.block))[:4]
            way = f"; {', '.join(map(str, sorted(near)))} would work" if near else ""
            raise RotationError(f"block_size={self.block_size} does not divide {self.size}{way}")
        if not self.dense and self.kind != PERMUTATION:
            factors(self.block)

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, fixes_ones: bool = False) -> "Rotation":
        """The rotation by a given matrix, learned for example.

        Args:
            matrix: ``(n, n)``, floating point, orthogonal in float64; it is copied.
            fixes_ones: it maps the all-ones vector to itself, which R1 needs on models with
                LayerNorm.

        Raises:
            RotationError: ``|QᵀQ - I|`` has an entry above 1e-12, or the ones are not fixed.
            TypeError: no floating-point tensor.
        """
        q = given_matrix(matrix, fixes_ones)
        return cls(MATRIX, len(q), None, 0, digest(q), fixes_ones, given=q)

    @classmethod
    def from_permutation(cls, order: Any) -> "Rotation":
        """The permutation ``y[i] = x[order[i]]``.

        Args:
            order: every number below its length once, ``(n,)``; it is copied.

        Raises:
            RotationError: a number is missing.
            TypeError: no row of whole numbers.
        """
        made = given_order(order)
        return cls(PERMUTATION, len(made), None, 0, digest(made), given=made)

    @property
    def dense(self) -> bool:
        """Whether the block is a dense matrix, not a Hadamard matrix and signs."""
        return self.kind in ("random-matrix", MATRIX)

    @property
    def known(self) -> bool:
        """Whether there is an operand; the matrix of another process has yet to be loaded."""
        return self.kind not in GIVEN or (self.unit or self).given is not None

    @property
    def has_operand(self) -> bool:
        """Whether the block is more than a Hadamard matrix; tracers ask this, not the operand."""
        return self.kind != "hadamard" or self.fixes_ones

    def __getstate__(self) -> dict[str, Any]:
        """Without operands that can be made again."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"unit": None}

    @property
    def block(self) -> int:
        """Order of the diagonal blocks."""
        return self.size if self.block_size is None else self.block_size

    @cached_property
    def operand(self) -> Tensor | None:
        """What defines the block besides its order, on the CPU.

        None for ``hadamard``, unless it fixes the ones; the signs ``D``, ``(b,)`` int8, for
        ``random-hadamard``; the block itself, ``(b, b)`` float64, where it is dense; the order,
        ``(b,)`` int64, of a ``permutation``.
        """
        if self.unit is not None:
            return self.unit.operand
        if self.kind in GIVEN:
            if self.given is None:
                raise RotationError(
                    f"the {self.kind} {self.label[:12]}… of order {self.block} is not here; a plan "
                    "that was read from JSON needs its matrices, Plan.from_dict(data, matrices)"
                )
            return self.given
        name = f"{self.seed}:{self.label}"
        if self.kind == "random-matrix":
            return random_matrix(name, self.block, self.fixes_ones)
        if not self.fixes_ones:
            return seeded_signs(name, self.block) if self.kind == "random-hadamard" else None
        signs = seeded_signs(
            "fixes-ones" if self.kind == "hadamard" else f"{name}:fixes-ones", self.block
        )
        signs[0] = 1
        return signs

    @cached_property
    def column_signs(self) -> Tensor:
        """The first column of the Hadamard matrix of order ``b``, ``(b,)`` int8."""
        unit = torch.zeros(self.block, dtype=torch.float64)
        unit[0] = 1
        return hadamard_transform(unit, transpose=True).to(torch.int8)

    def stages(self, operand: Tensor | None = None, inverse: bool = False) -> tuple[Stage, ...]:
        """``Q``, or ``Qᵀ``, as a product, the first factor first; all blocks have order ``b``.

        Args:
            operand: :attr:`operand` as it lies on some device; default, on the CPU.
            inverse: of the transpose.
        """
        if inverse:
            return inverted(self.stages(operand))
        if operand is None and self.has_operand:
            operand = self.operand
        forth = Hadamard(self.block)
        if operand is None:
            return (forth,)
        if self.dense:
            return (Matrix(operand),)
        if self.kind == PERMUTATION:
            return (Permutation(operand),)
        if not self.fixes_ones:
            return Signs(operand), forth
        first = Signs(self.column_signs.to(operand.device))
        return first, forth, Signs(operand), Hadamard(self.block, transpose=True), first

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
            impl: as for :func:`fastrot.hadamard_transform`; without meaning for dense ones.

        Returns:
            A new tensor like ``x``.

        Raises:
            RotationError: the dimension has another size.
        """
        if x.shape[dim] != self.size:
            raise RotationError(
                f"rotation of size {self.size} cannot act on dimension {dim} of {tuple(x.shape)}"
            )
        if operand is None and self.has_operand:
            assert self.operand is not None
            operand = self.operand.to(x.device)
        return multiply(x, self.stages(operand, inverse), dim, impl=impl)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense matrix ``Q``, ``(size, size)``, on the CPU."""
        return torch.block_diag(*[dense(self.stages())] * (self.size // self.block)).to(dtype)

    def __str__(self) -> str:
        """Short form for tables, for example ``hadamard 2048`` or ``hadamard 32x64``."""
        blocks = self.size // self.block
        order = f"{self.size}" if blocks == 1 else f"{blocks}x{self.block}"
        return f"{self.kind} {order}{', fixes ones' if self.fixes_ones else ''}"
