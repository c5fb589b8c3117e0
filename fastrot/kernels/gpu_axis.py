"""One Kronecker factor along the middle dimension: the passes of vectors too long for one tile.

    Y[o, :, c] = Hᵀ X[o, :, c]    with X of shape (outer, a, inner), H of order a

A tile is ``(a, COLUMNS)``, every access along the columns is contiguous, and no transposed copy
exists anywhere. Where the inner dimension is shorter than a tile, the columns (o, c) are numbered
through, so that no lane idles.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    add_left,
    backend_of,
    dot_left,
    matrix,
    padded,
    parts_between,
    parts_of,
    table,
    triton_dtype,
)


@triton.jit
def _columns(tile, columns, inner, SIZE: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr):
    """Offset of the first element, position along inner and validity of a tile's columns."""
    c = tl.arange(0, COLUMNS)[None, :]
    if FLAT:
        c = tile.to(tl.int64) * COLUMNS + c
        o = c // inner
        position = c - o * inner
        return o * inner * SIZE + position, position, c < columns
    else:
        # Tiles that end with a row leave only scalars to divide.
        per_row = tl.cdiv(inner, COLUMNS)
        o = tile // per_row
        position = (tile - o * per_row) * COLUMNS + c
        return o.to(tl.int64) * inner * SIZE + position, position, position < inner


@triton.jit
def _axis_tile(
    x,
    out,
    signs,
    h,
    kept,
    tile,
    scale,
    columns,
    inner,
    sign_stride,
    sign_run,
    SIZE: tl.constexpr,
    A: tl.constexpr,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    i = tl.arange(0, A)[:, None]
    first, position, valid = _columns(tile, columns, inner, SIZE, COLUMNS, FLAT)
    y = tl.zeros((A, COLUMNS), tl.float32)
    if CHUNK == A:
        v = _load_rows(
            x, signs, i, first, position, valid, inner, sign_stride, sign_run,
            SIZE, SIGNS and not TRANSPOSE,
        )  # fmt: skip
        y = dot_left(kept, v, y, PARTS, OPERAND)
    else:
        for start in tl.range(0, SIZE, CHUNK):
            k = start + tl.arange(0, CHUNK)
            v = _load_rows(
                x, signs, k[:, None], first, position, valid, inner, sign_stride, sign_run,
                SIZE, SIGNS and not TRANSPOSE,
            )  # fmt: skip
            m = matrix(h, i, k[None, :], SIZE, A, KIND, OPERAND)
            y = add_left(m, v, y, PARTS, OPERAND)
    y = y * scale
    inside = (i < SIZE) & valid
    if SIGNS and TRANSPOSE:
        d = tl.load(signs + i * sign_stride + position // sign_run, mask=inside, other=0.0)
        y = y * d.to(tl.float32)
    tl.store(out + first + i.to(tl.int64) * inner, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_rows(
    x,
    signs,
    k,
    first,
    position,
    valid,
    inner,
    sign_stride,
    sign_run,
    SIZE: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Rows k of a tile, times their signs; zero outside."""
    part = (k < SIZE) & valid
    v = tl.load(x + first + k.to(tl.int64) * inner, mask=part, other=0.0)
    if SIGNS:
        d = tl.load(signs + k * sign_stride + position // sign_run, mask=part, other=0.0)
        v = v * d.to(v.dtype)
    return v


@triton.jit(do_not_specialize=["tiles"])
def _axis_kernel(
    x,
    out,
    signs,
    h,
    scale,
    columns,
    inner,
    sign_stride,
    sign_run,
    tiles,
    SIZE: tl.constexpr,
    A: tl.constexpr,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    kept = 0
    if CHUNK == A:
        i = tl.arange(0, A)
        kept = matrix(h, i[:, None], i[None, :], SIZE, A, KIND, OPERAND)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _axis_tile(
                x, out, signs, h, kept, tile, scale, columns, inner, sign_stride, sign_run,
                SIZE, A, KIND, CHUNK, COLUMNS, FLAT, SIGNS, TRANSPOSE, PARTS, OPERAND,
            )  # fmt: skip
    else:
        _axis_tile(
            x, out, signs, h, kept, tl.program_id(0), scale, columns, inner, sign_stride, sign_run,
            SIZE, A, KIND, CHUNK, COLUMNS, FLAT, SIGNS, TRANSPOSE, PARTS, OPERAND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["scale_bits"])
def _axis64_kernel(
    x,
    out,
    signs,
    h,
    scale_bits,
    columns,
    inner,
    sign_stride,
    sign_run,
    SIZE: tl.constexpr,
    A: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    """The float64 form: Triton has no float64 dot on every target, so rank-one updates.

    A float argument would arrive in float32, so the scale comes as its bits.
    """
    i = tl.arange(0, A)[:, None]
    first, position, valid = _columns(tl.program_id(0), columns, inner, SIZE, COLUMNS, FLAT)
    y = tl.zeros((A, COLUMNS), tl.float64)
    for k in tl.range(0, SIZE):
        v = tl.load(x + first + tl.cast(k, tl.int64) * inner, mask=valid, other=0.0)
        if SIGNS and not TRANSPOSE:
            d = tl.load(signs + k * sign_stride + position // sign_run, mask=valid, other=0.0)
            v = v * d.to(tl.float64)
        y += matrix(h, i, k, SIZE, A, KIND, tl.float64) * v
    y = y * scale_bits.to(tl.int64).to(tl.float64, bitcast=True)
    inside = (i < SIZE) & valid
    if SIGNS and TRANSPOSE:
        d = tl.load(signs + i * sign_stride + position // sign_run, mask=inside, other=0.0)
        y = y * d.to(tl.float64)
    tl.store(out + first + i.to(tl.int64) * inner, y, mask=inside)


@dataclass(frozen=True)
class Factor:
    """One pass: the Kronecker factor M₁ ⊗ M₂ ⊗ … ⊗ H_power, of order ``size``."""

    bases: tuple[int, ...]
    power: int
    size: int


class Config(NamedTuple):
    """A tile: its columns, the chunk of the sum held at a time, the number of warps.

    ``resident`` programs on each multiprocessor walk over tiles (0: one program for each tile).
    """

    columns: int
    chunk: int
    num_warps: int
    resident: int = 0
    num_stages: int = 2


# By operand width and padded order of the factor; chosen so that nothing spills on any target.
CONFIGS = {
    16: {
        16: Config(256, 16, 4),
        32: Config(128, 32, 4),
        64: Config(128, 64, 8),
        128: Config(64, 64, 8),
        256: Config(64, 32, 8),
        512: Config(32, 32, 8),
    },
    32: {
        16: Config(128, 16, 4),
        32: Config(64, 32, 4),
        64: Config(64, 32, 4),
        128: Config(64, 16, 8),
        256: Config(32, 32, 8),
        512: Config(32, 16, 16),
    },
    64: {
        16: Config(64, 1, 4),
        32: Config(64, 1, 4),
        64: Config(32, 1, 4),
        128: Config(32, 1, 4),
        256: Config(16, 1, 4),
        512: Config(16, 1, 8),
    },
}


TUNED: dict[tuple[str, int], dict[int, Config]] = {
    ("hopper", 16): {
        64: Config(128, 64, 8, 1, 4),
        128: Config(128, 128, 8, 1, 3),
        256: Config(32, 256, 8, 1, 3),
    },
    ("hopper", 32): {
        32: Config(128, 32, 4, 2, 3),
        64: Config(64, 64, 4, 3, 3),
        128: Config(32, 128, 4, 2, 3),
    },
}
"""What was faster on an H200, by backend, bits of the input and padded order."""


def config_of(factor: Factor, source: torch.dtype, backend: str) -> Config:
    """The launch of a pass that reads ``source``."""
    size, bits = padded(factor.size), 8 * source.itemsize
    return TUNED.get((backend, bits), {}).get(size, CONFIGS[bits][size])


def axis_constants(
    factor: Factor,
    inner: int,
    source: torch.dtype,
    target: torch.dtype,
    signs: bool,
    transpose: bool,
    backend: str,
) -> dict[str, Any]:
    """The compile-time arguments and options of a launch from ``source`` to ``target`` dtype."""
    size, config = padded(factor.size), config_of(factor, source, backend)
    constants = {
        "SIZE": factor.size,
        "A": size,
        "KIND": TABLE.value if factor.bases else SYLVESTER.value,
        "COLUMNS": config.columns,
        "FLAT": inner < config.columns,
        "SIGNS": signs,
        "TRANSPOSE": transpose,
        "num_warps": config.num_warps,
    }
    if source == torch.float64:
        return constants
    operand = parts_of(source, backend)[0]
    return constants | {
        "CHUNK": config.chunk,
        "PARTS": parts_between(source, target, backend),
        "OPERAND": triton_dtype(operand, backend),
        "PERSISTENT": config.resident > 0,
        "num_stages": config.num_stages,
    }


def launch_axis(
    x: Tensor,
    out: Tensor,
    signs: Tensor | None,
    scale: float,
    transpose: bool,
    factor: Factor,
    inner: int,
    multiprocessors: int,
    sign_run: int = 1,
) -> None:
    """Multiply x, contiguous and seen as ``(outer, factor.size, inner)``, by one factor.

    x and out may be the same tensor and may differ in dtype, except that float64 meets only itself.
    The sign of element ``(k, c)`` is ``signs[k · (inner // sign_run) + c // sign_run]``.
    """
    backend = backend_of(x.device)
    constants = axis_constants(
        factor, inner, x.dtype, out.dtype, signs is not None, transpose, backend
    )
    h = x
    if factor.bases:
        size, dtype = padded(factor.size), parts_of(x.dtype, backend)[0]
        h = table(factor.bases, factor.power, 1, size, not transpose, dtype, x.device)
    number: float = scale
    if x.dtype == torch.float64:
        number = struct.unpack("q", struct.pack("d", scale))[0]
    columns = x.numel() // factor.size
    if constants["FLAT"]:
        tiles = triton.cdiv(columns, constants["COLUMNS"])
    else:
        tiles = columns // inner * triton.cdiv(inner, constants["COLUMNS"])
    arguments = (
        *(x, out, x if signs is None else signs, h, number),
        *(columns, inner, inner // sign_run, sign_run),
    )
    if x.dtype == torch.float64:
        _axis64_kernel[(tiles,)](*arguments, **constants)
        return
    programs = tiles
    if constants["PERSISTENT"]:
        programs = min(tiles, config_of(factor, x.dtype, backend).resident * multiprocessors)
    _axis_kernel[(programs,)](*arguments, tiles, **constants)
