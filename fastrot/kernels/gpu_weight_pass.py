"""One pass over a weight: the tiles of a matrix, each multiplied from one side or from both.

    Y = Hᵀ X K    for every tile X of (P, Q) elements, H and K orthonormal Hadamard factors or I

The factor H acts along the lines of a tile, which run down the columns of the weight or along its
rows, ``inner`` elements from one to the next; K acts across them, on neighbouring columns. A row
of n = a · b elements is an (a, b) tile with ``inner = b``: both factors of H_n = H_a ⊗ H_b in one
pass.

Arithmetic is float64 or float32 throughout, the products are ``tl.dot``. In float64 they run on
tensor cores (DMMA on NVIDIA from compute capability 8, MFMA on CDNA), which round like separate
operations do; in float32 they are fused multiply-adds.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot.kernels.gpu_axis import Factor
from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    interpreted,
    matrix,
    padded,
    table,
)


@triton.jit
def _place(first, i, j, I_STEP: tl.constexpr, J_STEP: tl.constexpr):
    """The row or column of elements (i, j), broadcast only if it depends on both."""
    if I_STEP == 0:
        return first + j * J_STEP
    elif J_STEP == 0:
        return first + i * I_STEP
    else:
        return first + i * I_STEP + j * J_STEP


@triton.jit
def _scaled(v, row_weights, column_weights, rows, columns, inside):
    if row_weights is not None:
        v *= tl.load(row_weights + rows, mask=inside, other=0).to(v.dtype)
    if column_weights is not None:
        v *= tl.load(column_weights + columns, mask=inside, other=0).to(v.dtype)
    return v


@triton.jit
def _pass_kernel(
    x,
    out,
    rows_before,
    columns_before,
    rows_after,
    columns_after,
    h_table,
    k_table,
    x_stride,
    out_stride,
    extent,
    width,
    tiles,
    count,
    u_rows,
    v_rows,
    v_columns,
    ROWS_I: tl.constexpr,
    COLUMNS_I: tl.constexpr,
    ROWS_J: tl.constexpr,
    COLUMNS_J: tl.constexpr,
    SPAN: tl.constexpr,
    P: tl.constexpr,
    H_SIZE: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    Q: tl.constexpr,
    K_SIZE: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // tiles
    across = (program - block * tiles) * Q
    u = block // count
    v = block - u * count
    row = u * u_rows + v * v_rows + across * ROWS_J
    column = v * v_columns + across * COLUMNS_J
    remaining = extent - (row if ROWS_I > 0 else column)

    i = tl.arange(0, P)[:, None]
    q = tl.arange(0, Q)
    j = q[None, :]
    y = tl.zeros((P, Q), DTYPE)
    k = 0
    if K != 0:
        k = matrix(k_table, q[:, None], j, K_SIZE, Q, K, DTYPE)
    for start in tl.range(0, SPAN, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        m = chunk[:, None]
        inside = (m < SPAN) & (m * (ROWS_I + COLUMNS_I) < remaining) & (across + j < width)
        rows = _place(row, m, j, ROWS_I, ROWS_J)
        columns = _place(column, m, j, COLUMNS_I, COLUMNS_J)
        t = tl.load(x + rows.to(tl.int64) * x_stride + columns, mask=inside, other=0.0).to(DTYPE)
        t = _scaled(t, rows_before, columns_before, rows, columns, inside)
        if K != 0:
            t = tl.dot(t, k, input_precision="ieee", out_dtype=DTYPE)
        h = matrix(h_table, i, chunk[None, :], H_SIZE, P, H, DTYPE)
        y = tl.dot(h, t, y, input_precision="ieee", out_dtype=DTYPE)
    y = y * SCALE
    inside = (i < SPAN) & (i * (ROWS_I + COLUMNS_I) < remaining) & (across + j < width)
    rows = _place(row, i, j, ROWS_I, ROWS_J)
    columns = _place(column, i, j, COLUMNS_I, COLUMNS_J)
    # Signs commute with rounding, and fewer registers hold what is rounded.
    y = _scaled(y.to(out.dtype.element_ty), rows_after, columns_after, rows, columns, inside)
    tl.store(out + rows.to(tl.int64) * out_stride + columns, y, mask=inside)


@dataclass(frozen=True)
class Pass:
    """Factors H along the lines of every tile and K across them.

    Attributes:
        down: lines run down the columns of the weight, not along its rows.
        h: the factor along the lines.
        h_transpose: use its transpose.
        inner: distance of the elements of a line; 1 if H is the last factor of its side.
        k: the factor of neighbouring columns, None for the identity. Its order divides the columns
            of a tile, or is ``inner`` if the lines run along rows.
        k_transpose: use its transpose.
    """

    down: bool
    h: Factor
    h_transpose: bool
    inner: int
    k: Factor | None = None
    k_transpose: bool = False

    @property
    def copies(self) -> int:
        """Neighbouring blocks that share a tile, which a small one would not fill."""
        return max(1, 64 // self.h.size) if self.inner == 1 else 1


class Config(NamedTuple):
    """A launch: rows of a sum at a time, warps, stages of the loop over them."""

    chunk: int
    num_warps: int
    num_stages: int


# By dtype and padded order of H; chosen so that nothing spills on any NVIDIA target.
CONFIGS = {
    torch.float64: {
        16: Config(16, 4, 1),
        32: Config(32, 4, 1),
        64: Config(64, 4, 1),
        128: Config(16, 8, 2),
        256: Config(16, 8, 2),
        512: Config(16, 8, 1),
    },
    torch.float32: {
        16: Config(16, 4, 1),
        32: Config(16, 4, 1),
        64: Config(16, 4, 2),
        128: Config(16, 8, 2),
        256: Config(16, 16, 1),
        512: Config(16, 16, 1),
    },
}
WIDE = Config(16, 8, 1)
"""For a factor K of order 128, which fills shared memory."""


def across(step: Pass) -> int:
    """Columns of a tile, Q."""
    if step.k is not None:
        return max(padded(step.k.size), 64 if step.down else 16)
    return 32 if step.h.size > 256 else 64


def pass_constants(step: Pass, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments and options of a launch in ``dtype`` arithmetic."""
    span, width = step.copies * step.h.size, across(step)
    P = padded(span)
    config = WIDE if width > 64 else CONFIGS[dtype][P]
    k = step.k or Factor((), 1, 1)
    # Neighbouring elements of a line are neighbours in memory if it ends its rows.
    turned = not step.down and step.inner == 1
    return {
        "ROWS_I": step.inner if step.down else 0,
        "COLUMNS_I": 0 if step.down else step.inner,
        "ROWS_J": int(turned),
        "COLUMNS_J": int(not turned),
        "SPAN": span,
        "P": P,
        "H_SIZE": step.h.size,
        "H": TABLE.value if step.h.bases else SYLVESTER.value,
        "CHUNK": config.chunk,
        "Q": width,
        "K_SIZE": k.size,
        "K": 0 if step.k is None else TABLE.value if k.bases else SYLVESTER.value,
        "SCALE": (step.h.size * k.size) ** -0.5,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def launch_pass(
    x: Tensor,
    out: Tensor,
    before: tuple[Tensor | None, Tensor | None],
    after: tuple[Tensor | None, Tensor | None],
    step: Pass,
    dtype: torch.dtype,
    ahead: bool = False,
) -> None:
    """Write a pass over x between two pairs of diagonals into out, which may be x.

    Args:
        x: ``(rows, columns)``, a floating dtype, unit column stride, any row stride.
        out: as x but for the dtype.
        before: what multiplies the rows ``(rows,)`` and the columns ``(columns,)`` of x, in
            ``dtype``, or None.
        after: likewise, of the result.
        step: the factors.
        dtype: of the arithmetic.
        ahead: compile only, for arguments such as these.
    """
    constants = pass_constants(step, dtype)
    rows, columns = x.shape
    span, inner, Q = constants["SPAN"], step.inner, constants["Q"]
    if step.down:
        extent, width, count = rows, columns, inner
        blocks = triton.cdiv(rows, span * inner) * inner
        u_rows, v_rows, v_columns = span * inner, 1, 0
    else:
        extent, width, count = columns, inner, triton.cdiv(columns, span * inner)
        blocks, u_rows, v_rows, v_columns = rows * count, 1, 0, span * inner
        if inner == 1:
            width, blocks = rows, count
    tiles = triton.cdiv(width, Q)

    def entries(factor: Factor | None, copies: int, size: int, flip: bool) -> Tensor:
        if factor is None or not factor.bases:
            return x
        return table(factor.bases, factor.power, copies, size, flip, dtype, x.device)

    arguments = (
        x,
        out,
        *before,
        *after,
        entries(step.h, step.copies, constants["P"], not step.h_transpose),
        entries(step.k, 1, Q, step.k_transpose),
        x.stride(0),
        out.stride(0),
        extent,
        width,
        tiles,
        count,
        u_rows,
        v_rows,
        v_columns,
    )
    grid = (blocks * tiles,)
    if not ahead:
        _pass_kernel[grid](*arguments, **constants)
    elif not interpreted():
        _pass_kernel.warmup(*arguments, grid=grid, **constants)
