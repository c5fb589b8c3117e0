"""The stages of a rotation, and the one loop that multiplies by them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastrot.hadamard import hadamard_matrix
from fastrot.kernels import hadamard_transform
from fastrot.kernels.weight import Side

T = TypeVar("T")


class Signs(NamedTuple):
    """Signs of the entries of every block: ``(b,)`` int8, ±1."""

    values: Tensor

    @property
    def block(self) -> int:
        """Order of the blocks."""
        return len(self.values)

    def to(self, device: torch.device) -> "Signs":
        """The same on a device."""
        return Signs(self.values.to(device))


class Hadamard(NamedTuple):
    """The Hadamard matrix of order ``b`` over ``√b`` in every block, or its transpose."""

    block: int
    transpose: bool = False

    def to(self, device: torch.device) -> "Hadamard":
        """The same on any device."""
        return self


class Matrix(NamedTuple):
    """An orthogonal matrix in every block, ``(b, b)`` float64, or its transpose."""

    q: Tensor
    transpose: bool = False

    @property
    def block(self) -> int:
        """Order of the blocks."""
        return len(self.q)

    def to(self, device: torch.device) -> "Matrix":
        """The same on a device."""
        return Matrix(self.q.to(device), self.transpose)


class Permutation(NamedTuple):
    """The entries of every block in another order: ``y[i] = x[order[i]]``, ``(b,)`` int64."""

    order: Tensor

    @property
    def block(self) -> int:
        """Order of the blocks."""
        return len(self.order)

    def to(self, device: torch.device) -> "Permutation":
        """The same on a device."""
        return Permutation(self.order.to(device))


Stage = Signs | Hadamard | Matrix | Permutation


def inverted(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of the inverse, which is the transpose."""
    return tuple(_inverse(stage) for stage in reversed(stages))


def _inverse(stage: Stage) -> Stage:
    if isinstance(stage, Signs):
        return stage
    if isinstance(stage, Permutation):
        return Permutation(stage.order.argsort())
    return stage._replace(transpose=not stage.transpose)


def merged(stages: Iterable[Stage | T]) -> list[Side | Signs | Matrix | Permutation | T]:
    """The stages as kernels take them: signs go along with the Hadamard matrix beside them.

    Args:
        stages: what is no stage among them stays where it is.
    """
    made: list[Side | Signs | Matrix | Permutation | T] = []
    for stage in stages:
        last = made[-1] if made else None
        if isinstance(stage, Hadamard):
            signs = None
            if not stage.transpose and isinstance(last, Signs) and last.block == stage.block:
                signs = last.values
                made.pop()
            made.append(Side(stage.block, signs, stage.transpose))
        elif (
            isinstance(stage, Signs)
            and isinstance(last, Side)
            and last.transpose
            and last.signs is None
            and last.size == stage.block
        ):
            made[-1] = last._replace(signs=stage.values)
        else:
            made.append(stage)
    return made


def multiply(x: Tensor, stages: Sequence[Stage], dim: int = -1, *, impl: str = "auto") -> Tensor:
    """``v → v S₁ S₂ …`` for the vectors of ``x`` along ``dim``.

    Args:
        x: any shape whose ``dim`` is a multiple of every block; floating point.
        stages: their tensors lie on the device of ``x``.
        dim: where the vectors lie.
        impl: of the Hadamard transforms, see :func:`fastrot.hadamard_transform`.

    Returns:
        A new tensor like ``x``, rounded once if ``x`` has 16 bits.
    """
    parts = merged(stages)
    y = x
    if len(parts) != 1 or isinstance(parts[0], Matrix):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
    for part in parts:
        if isinstance(part, Side):
            y = hadamard_transform(
                y,
                part.size**-0.5,
                dim=dim,
                block_size=part.size,
                signs=part.signs,
                transpose=part.transpose,
                impl=impl,
            )
            continue
        vectors = y.movedim(dim, -1).unflatten(-1, (-1, part.block))
        if isinstance(part, Signs):
            vectors = vectors * part.values.to(y.dtype)
        elif isinstance(part, Permutation):
            vectors = vectors[..., part.order]
        else:
            q = part.q.to(y.dtype)
            vectors = vectors @ (q.T if part.transpose else q)
        y = vectors.flatten(-2).movedim(-1, dim)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def dense(stages: Sequence[Stage]) -> Tensor:
    """The product of one block of every stage, ``(b, b)`` float64 on the CPU."""
    first, *others = (_matrix(stage) for stage in stages)
    for other in others:
        first = first @ other
    return first


def _matrix(stage: Stage) -> Tensor:
    if isinstance(stage, Signs):
        return torch.diag(stage.values.cpu().to(torch.float64))
    if isinstance(stage, Permutation):
        return torch.eye(stage.block, dtype=torch.float64)[:, stage.order.cpu()]
    if isinstance(stage, Hadamard):
        q = torch.from_numpy(hadamard_matrix(stage.block)).to(torch.float64) * stage.block**-0.5
    else:
        q = stage.q.cpu()
    return q.T if stage.transpose else q
