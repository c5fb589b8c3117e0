"""Vectors in rows: one read, two matrix products on tensor cores, one write.

    H_n = H_a ⊗ H_b,    y = x H_n    ⇔    Y = H_aᵀ X H_b    with x, y seen as (a, b) matrices X, Y.

A tile stacks ``copies`` vectors to ``(copies · a, b)`` and pads it with zeros to ``(A, B)``; the
left factor is then I ⊗ H_aᵀ. The first product is exact for 16-bit input. Its result stays in
registers, where the accumulator of one product already has the layout of the left operand of the
next. Programs are persistent: each makes its two matrices once and walks over tiles, so that the
loads of the next tile can be in flight. See :mod:`fastrot.kernels.gpu_rows_tile` for the tiles.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    backend_of,
    parts_between,
    parts_of,
    table,
    triton_dtype,
)
from fastrot.kernels.gpu_rows_tile import blocks, right_blocks, tile_in_loops, tile_in_pieces
from fastrot.kernels.gpu_tiles import Tile, product


@triton.jit
def _transform_tile(
    x,
    out,
    signs,
    left,
    right,
    scale,
    h_left,
    h_right,
    base,
    remaining,
    ROWS: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    B: tl.constexpr,
    Q: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    MIDDLE_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE_OPERAND: tl.constexpr,
):
    if CHUNK == A and BLOCK == B:
        tile_in_pieces(
            x, out, signs, h_left, h_right, scale, base, remaining,
            ROWS, P, A // P, LEFT_SIZE, LEFT, COLUMNS, Q, B // Q, RIGHT_SIZE, RIGHT,
            BOUNDED, SIGNS, TRANSPOSE, PARTS, MIDDLE_PARTS, OPERAND, MIDDLE_OPERAND,
        )  # fmt: skip
    else:
        tile_in_loops(
            x, out, signs, left, right, scale, h_left, h_right, base, remaining,
            ROWS, A, LEFT_SIZE, LEFT, COLUMNS, B, RIGHT_SIZE, RIGHT, BOUNDED, CHUNK, BLOCK,
            SIGNS, TRANSPOSE, PARTS, MIDDLE_PARTS, OPERAND, MIDDLE_OPERAND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["vectors", "tiles"])
def _rows_kernel(
    x,
    out,
    signs,
    left,
    right,
    scale,
    vectors,
    tiles,
    PER_TILE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ROWS: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    B: tl.constexpr,
    Q: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    RIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    MIDDLE_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE_OPERAND: tl.constexpr,
):
    h_left = ()
    h_right = ()
    if CHUNK == A:
        h_left = blocks(left, A // P, P, LEFT_SIZE, LEFT, OPERAND)
    if BLOCK == B:
        h_right = right_blocks(right, B // Q, Q, RIGHT_SIZE, RIGHT, MIDDLE_OPERAND)
    first = tl.program_id(0)
    if PERSISTENT:
        for tile in tl.range(first, tiles, tl.num_programs(0), flatten=BLOCK < B):
            _transform_tile(
                x, out, signs, left, right, scale, h_left, h_right,
                tl.cast(tile, tl.int64) * (ROWS * COLUMNS), vectors - tile * PER_TILE,
                ROWS, A, P, LEFT_SIZE, LEFT, COLUMNS, B, Q, RIGHT_SIZE, RIGHT, PER_TILE > 1,
                CHUNK, BLOCK, SIGNS, TRANSPOSE, PARTS, MIDDLE_PARTS, OPERAND, MIDDLE_OPERAND,
            )  # fmt: skip
    else:
        _transform_tile(
            x, out, signs, left, right, scale, h_left, h_right,
            first.to(tl.int64) * (ROWS * COLUMNS), vectors - first * PER_TILE,
            ROWS, A, P, LEFT_SIZE, LEFT, COLUMNS, B, Q, RIGHT_SIZE, RIGHT, PER_TILE > 1,
            CHUNK, BLOCK, SIGNS, TRANSPOSE, PARTS, MIDDLE_PARTS, OPERAND, MIDDLE_OPERAND,
        )  # fmt: skip


def rows_constants(
    tile: Tile,
    source: torch.dtype,
    target: torch.dtype,
    signs: bool,
    transpose: bool,
    backend: str,
) -> dict[str, Any]:
    """The compile-time arguments and options of a launch from ``source`` to ``target`` dtype."""
    a = product(tile.left_bases, tile.left_power)
    b = product(tile.right_bases, tile.right_power)
    per_tile = tile.copies * tile.packed
    operand, parts = parts_of(source, backend)[0], parts_between(source, target, backend)
    middle, middle_parts = operand, parts
    if a > 1:
        middle = parts_of(torch.float32, backend)[0]
        middle_parts = parts_between(torch.float32, target, backend)
    config = tile.config
    block = tile.B if tile.chunked else min(config.block or tile.B, tile.B)
    # Signs behind a loop over blocks leave no registers for the loads of the next tile.
    persistent = tile.resident > 0 and not (block < tile.B and signs and transpose)
    return {
        "PER_TILE": per_tile,
        "PERSISTENT": persistent,
        "ROWS": tile.copies * a,
        "A": tile.A,
        "P": config.rows or tile.A,
        "LEFT_SIZE": a,
        "LEFT": 0 if a == 1 else TABLE.value if tile.left_bases else SYLVESTER.value,
        "COLUMNS": tile.packed * b,
        "B": tile.B,
        "Q": config.columns or tile.B,
        "RIGHT_SIZE": b,
        "RIGHT": TABLE.value if tile.right_bases else SYLVESTER.value,
        # Rows of a sum at a time; three parts of them cost registers.
        "CHUNK": (16 if parts == 3 else 32) if tile.chunked else tile.A,
        "BLOCK": block,
        "SIGNS": signs,
        "TRANSPOSE": transpose,
        "PARTS": parts,
        "MIDDLE_PARTS": middle_parts,
        "OPERAND": triton_dtype(operand, backend),
        "MIDDLE_OPERAND": triton_dtype(middle, backend),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def launch_rows(
    x: Tensor,
    out: Tensor,
    signs: Tensor | None,
    scale: float,
    transpose: bool,
    tile: Tile,
    multiprocessors: int,
) -> Any:
    """``out = scale · (x D)H`` or its transpose for contiguous ``(…, n)`` x and out.

    x and out may differ in dtype (float32, bfloat16, float16) and may be the same tensor.
    Returns the compiled kernel.
    """
    if signs is not None and not tile.config.signs:
        n = product(tile.left_bases + tile.right_bases, tile.left_power * tile.right_power)
        with torch.inference_mode(out.is_inference()):
            if transpose:
                made = launch_rows(x, out, None, scale, True, tile, multiprocessors)
                out.view(-1, n).mul_(signs.to(out.dtype))
                return made
            # Nothing is rounded before the transform.
            signed = out if out.dtype == x.dtype else torch.empty_like(x)
            torch.mul(x.view(-1, n), signs.to(x.dtype), out=signed.view(-1, n))
            return launch_rows(signed, out, None, scale, False, tile, multiprocessors)
    backend = backend_of(x.device)
    constants = rows_constants(tile, x.dtype, out.dtype, signs is not None, transpose, backend)
    operand = parts_of(x.dtype, backend)[0]
    left = right = x
    if tile.left_bases:
        left = table(
            tile.left_bases, tile.left_power, tile.copies, tile.A, not transpose, operand, x.device
        )
    if tile.right_bases:
        right = table(
            tile.right_bases, tile.right_power, tile.packed, tile.B, transpose, operand, x.device
        )
    vectors = x.numel() // (constants["LEFT_SIZE"] * constants["RIGHT_SIZE"])
    tiles = triton.cdiv(vectors, constants["PER_TILE"])
    programs = tiles
    if constants["PERSISTENT"]:
        programs = min(tiles, tile.resident * multiprocessors)
    return _rows_kernel[(programs,)](
        x,
        out,
        x if signs is None else signs,
        left,
        right,
        scale,
        vectors,
        tiles,
        **constants,
    )
