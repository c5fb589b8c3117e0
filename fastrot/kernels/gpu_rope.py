"""RoPE and R3 in one kernel: queries and keys rotated twice, keys and values quantised.

    y = rope(x) · D · (I ⊗ H),    codes, scales = quantise(y)

A tile holds vectors of one head each, in rows; vector ``token · heads + head`` of the queries, of
the keys or of the values, which one launch covers one after the other. Each vector is quantised by
itself. What is neither input nor output stays in registers and shared memory, in float32.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from fastrot.kernels.gpu_formats import NONE, store_tile
from fastrot.kernels.gpu_matrix import dot_right, matrix


@triton.jit
def _angles(table, position, place, stride, inside):
    return tl.load(table + position * stride + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _embed(
    x,
    row,
    inside,
    cos,
    sin,
    position,
    cos_stride,
    sin_stride,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Columns START … of vectors after RoPE, which turns pairs of their first ROTARY elements.

    A pair is two neighbours, or elements that are half of ROTARY apart. ``row`` is the offset of
    a vector, ``(A, 1)``. The result is ``(A, BLOCK)`` and float32.
    """
    HALF: tl.constexpr = ROTARY // 2
    j = START + tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        v = tl.load(x + row + j, mask=inside & (j < SIZE), other=0.0).to(tl.float32)
        A: tl.constexpr = v.shape[0]
        first, second = tl.split(tl.reshape(v, (A, BLOCK // 2, 2)))
        pair = START // 2 + tl.arange(0, BLOCK // 2)[None, :]
        turned = inside & (pair < HALF)
        c = tl.where(pair < HALF, _angles(cos, position, pair, cos_stride, turned), 1.0)
        s = _angles(sin, position, pair, sin_stride, turned)
        both = tl.join(first * c - second * s, second * c + first * s)
        return tl.reshape(both, (A, BLOCK))
    else:
        turned = inside & (j < ROTARY)
        pair = tl.where(j < HALF, j, j - HALF)
        other = tl.where(j < HALF, j + HALF, j - HALF)
        v = tl.load(x + row + j, mask=inside & (j < SIZE), other=0.0).to(tl.float32)
        w = tl.load(x + row + other, mask=turned, other=0.0).to(tl.float32)
        c = tl.where(j < ROTARY, _angles(cos, position, pair, cos_stride, turned), 1.0)
        s = _angles(sin, position, pair, sin_stride, turned)
        return v * c + tl.where(j < HALF, -w, w) * s


@triton.jit
def _rotate_tile(
    x,
    tile,
    tokens,
    heads,
    token_stride,
    head_stride,
    cos,
    sin,
    positions,
    cos_stride,
    sin_stride,
    signs,
    h,
    out,
    scales,
    world,
    scale,
    A: tl.constexpr,
    B: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKED: tl.constexpr,
    NATIVE: tl.constexpr,
    TURN: tl.constexpr,
):
    """Rotate vectors, or only quantise them if TURN is false."""
    first = tl.cast(tile, tl.int64) * A
    vectors = tl.cast(tokens, tl.int64) * heads
    vector = first + tl.arange(0, A)[:, None]
    inside = vector < vectors
    token = vector // heads
    row = token * token_stride + (vector - token * heads) * head_stride
    if TURN:
        position = token
        if POSITIONS:
            position = tl.load(positions + token, mask=inside, other=0).to(tl.int64)
        y = tl.zeros((A, B), tl.float32)
        for part in tl.static_range(B // BLOCK):
            t = _embed(
                x, row, inside, cos, sin, position, cos_stride, sin_stride,
                part * BLOCK, BLOCK, SIZE, ROTARY, INTERLEAVED,
            )  # fmt: skip
            if SIGNS:
                k = part * BLOCK + tl.arange(0, BLOCK)[None, :]
                t *= tl.load(signs + k % BLOCK_SIZE, mask=k < SIZE, other=0.0).to(tl.float32)
            y = dot_right(t, h[part], y, PARTS, OPERAND)
        factor = tl.zeros((A, 1), tl.float32) + scale
    else:
        j = tl.arange(0, B)[None, :]
        y = tl.load(x + row + j, mask=inside & (j < SIZE), other=0.0).to(tl.float32)
        factor = tl.zeros((A, 1), tl.float32) + 1.0
    store_tile(
        y, factor, out, scales, world, first, vectors,
        KIND, GROUP, BLOCKED, NATIVE, A, B, SIZE, 1, A,
    )  # fmt: skip


@triton.jit
def _rope_kernel(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    k_scales,
    v_scales,
    cos,
    sin,
    positions,
    signs,
    table,
    global_scale,
    scale,
    tokens,
    q_tiles,
    k_tiles,
    tiles,
    q_heads,
    k_heads,
    v_heads,
    q_token_stride,
    k_token_stride,
    v_token_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    A: tl.constexpr,
    B: tl.constexpr,
    SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_B: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MATRIX: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKED: tl.constexpr,
    GLOBAL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    world = 1.0
    if GLOBAL:
        world = tl.load(global_scale)
    j = tl.arange(0, B)
    h = ()
    for part in tl.static_range(B // BLOCK):
        i = part * BLOCK + tl.arange(0, BLOCK)
        h += (matrix(table, i[:, None], j[None, :], BLOCK_SIZE, B, MATRIX, OPERAND),)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < q_tiles:
            _rotate_tile(
                q, tile, tokens, q_heads, q_token_stride, q_head_stride,
                cos, sin, positions, cos_stride, sin_stride, signs, h, q_out, q_out, world, scale,
                A, B, SIZE, ROTARY, INTERLEAVED, POSITIONS, SIGNS, BLOCK, BLOCK_SIZE,
                PARTS, OPERAND,
                NONE, 0, False, False, True,
            )  # fmt: skip
        elif tile < q_tiles + k_tiles:
            _rotate_tile(
                k, tile - q_tiles, tokens, k_heads, k_token_stride, k_head_stride,
                cos, sin, positions, cos_stride, sin_stride, signs, h, k_out, k_scales, world,
                scale,
                A, B, SIZE, ROTARY, INTERLEAVED, POSITIONS, SIGNS, BLOCK, BLOCK_SIZE,
                PARTS, OPERAND,
                KIND, GROUP, BLOCKED, NATIVE, True,
            )  # fmt: skip
        elif VALUES:
            _rotate_tile(
                v, tile - q_tiles - k_tiles, tokens, v_heads, v_token_stride, v_head_stride,
                cos, sin, positions, cos_stride, sin_stride, signs, h, v_out, v_scales, world,
                scale,
                A, V_B, V_SIZE, 0, False, False, False, BLOCK, BLOCK_SIZE, PARTS, OPERAND,
                KIND, GROUP, BLOCKED, NATIVE, False,
            )  # fmt: skip
