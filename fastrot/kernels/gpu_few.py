"""Few vectors, as in decoding: each is shared by many programs, since nothing else fills the GPU.

    Y[I, J] = H_aᵀ[I, :] · (X · H_b[:, J])    with x, y seen as (a, b) matrices X, Y

A program makes the block (I, J) of one vector's result. It reads all of the vector, which the L2
cache holds, and only those columns of the right and rows of the left matrix that it needs: making
whole matrices is what takes the time of :mod:`fastrot.kernels.gpu_rows` where one tile is all there
is. The result must not overlap the input.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    backend_of,
    dot_left,
    dot_right,
    matrix,
    padded,
    parts_of,
    table,
    triton_dtype,
)

ROWS, COLUMNS = 16, 32
"""Of the block of a program."""

EXACT = 32768
"""Padded elements of a vector that a program holds as they are in memory."""
PARTED = {"ampere": 2048}
"""If they are first multiplied by signs, or cut into parts: Ampere then holds them in registers."""


class Cut(NamedTuple):
    """H_n = H_a ⊗ H_b, each factor with its base matrices and its power."""

    left: tuple[tuple[int, ...], int]
    right: tuple[tuple[int, ...], int]

    @property
    def a(self) -> int:
        """The order of the left factor."""
        return math.prod(self.left[0]) * self.left[1]

    @property
    def b(self) -> int:
        """The order of the right factor."""
        return math.prod(self.right[0]) * self.right[1]

    @property
    def blocks(self) -> int:
        """Programs for each vector."""
        return triton.cdiv(self.a, ROWS) * triton.cdiv(self.b, COLUMNS)


@triton.jit
def _few_kernel(
    x,
    out,
    signs,
    left,
    right,
    scale,
    A: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    B: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    MIDDLE_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE_OPERAND: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * (LEFT_SIZE * RIGHT_SIZE)
    i = tl.arange(0, A)
    j = tl.arange(0, B)
    inside = (i < LEFT_SIZE)[:, None] & (j < RIGHT_SIZE)[None, :]
    offset = i[:, None] * RIGHT_SIZE + j[None, :]
    v = tl.load(x + base + offset, mask=inside, other=0.0)
    if SIGNS and not TRANSPOSE:
        v = v * tl.load(signs + offset, mask=inside, other=0.0).to(v.dtype)
    r = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    c = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = matrix(right, j[:, None], c[None, :], RIGHT_SIZE, B, RIGHT, OPERAND)
    t = dot_right(v, h, tl.zeros((A, BLOCK_B), tl.float32), PARTS, OPERAND)
    h = matrix(left, r[:, None], i[None, :], LEFT_SIZE, A, LEFT, MIDDLE_OPERAND)
    y = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    y = dot_left(h, t, y, MIDDLE_PARTS, MIDDLE_OPERAND) * scale
    inside = (r < LEFT_SIZE)[:, None] & (c < RIGHT_SIZE)[None, :]
    offset = r[:, None] * RIGHT_SIZE + c[None, :]
    if SIGNS and TRANSPOSE:
        y = y * tl.load(signs + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + base + offset, y.to(out.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=1024)
def cut_for(bases: tuple[int, ...], power: int, exact: bool, backend: str) -> Cut | None:
    """The squarest cut of a vector that a program holds, None if there is none."""
    most, widest = (EXACT, 256) if exact else (PARTED.get(backend, EXACT // 2), 128)
    atoms = (*bases, *[2] * (power.bit_length() - 1))
    cuts = []
    for stop in range(len(atoms) + 1):
        split = min(stop, len(bases))
        here, there = 2 ** (stop - split), 2 ** min(len(atoms) - len(bases), len(atoms) - stop)
        cut = Cut((bases[:split], here), (bases[split:], there))
        A, B = padded(cut.a), padded(cut.b)
        if A <= 256 and widest >= B and most >= A * B:
            cuts.append((A * B, A + B, cut))
    return min(cuts)[2] if cuts else None


def is_exact(dtype: torch.dtype, signs: bool, transpose: bool) -> bool:
    """Whether the first product takes a vector as it is in memory."""
    return dtype.itemsize == 2 and (transpose or not signs)


def few_constants(
    cut: Cut, dtype: torch.dtype, signs: bool, transpose: bool, backend: str
) -> dict[str, Any]:
    """The compile-time arguments and options of a launch."""
    operand, parts = parts_of(dtype, backend)
    middle, middle_parts = parts_of(torch.float32, backend)
    A, B = padded(cut.a), padded(cut.b)
    return {
        "A": A,
        "LEFT_SIZE": cut.a,
        "LEFT": TABLE.value if cut.left[0] else SYLVESTER.value,
        "BLOCK_A": ROWS,
        "B": B,
        "RIGHT_SIZE": cut.b,
        "RIGHT": TABLE.value if cut.right[0] else SYLVESTER.value,
        "BLOCK_B": min(COLUMNS, B),
        "SIGNS": signs,
        "TRANSPOSE": transpose,
        "PARTS": parts,
        "MIDDLE_PARTS": min(middle_parts, parts + 1),
        "OPERAND": triton_dtype(operand, backend),
        "MIDDLE_OPERAND": triton_dtype(middle, backend),
        "num_warps": 4 if A * B <= 8192 else 8,
    }


def launch_few(
    x: Tensor, out: Tensor, signs: Tensor | None, scale: float, transpose: bool, cut: Cut
) -> None:
    """``out = scale · (x D)H`` or its transpose for contiguous ``(…, n)`` tensors of one dtype."""
    backend = backend_of(x.device)
    constants = few_constants(cut, x.dtype, signs is not None, transpose, backend)
    left = right = x
    if cut.left[0]:
        dtype = parts_of(torch.float32, backend)[0]
        left = table(*cut.left, 1, constants["A"], not transpose, dtype, x.device)
    if cut.right[0]:
        dtype = parts_of(x.dtype, backend)[0]
        right = table(*cut.right, 1, constants["B"], transpose, dtype, x.device)
    rows, columns = triton.cdiv(cut.a, ROWS), triton.cdiv(cut.b, constants["BLOCK_B"])
    _few_kernel[(x.numel() // (cut.a * cut.b), rows, columns)](
        x, out, x if signs is None else signs, left, right, scale, **constants
    )
