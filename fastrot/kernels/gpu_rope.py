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
def _places(tile, tokens, heads, token_stride, head_stride, A: tl.constexpr):
    """Of the vectors of a tile, ``(A, 1)``: whether there are any, their tokens and offsets."""
    # Divisions of 32 bits are several times as fast as those of 64.
    vector = tile * A + tl.arange(0, A)[:, None]
    token = vector // heads
    head = tl.cast(vector - token * heads, tl.int64)
    inside = vector < tokens * heads
    token = tl.cast(token, tl.int64)
    return inside, token, token * token_stride + head * head_stride


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
):
    """The vectors of a tile after RoPE and the transform, without its scale: ``(A, B)``."""
    inside, token, row = _places(tile, tokens, heads, token_stride, head_stride, A)
    position = token
    if POSITIONS:
        position = tl.load(positions + token, mask=inside, other=0).to(tl.int64)
    parts = ()
    if ROTARY == B and 2 * BLOCK == B and not INTERLEAVED:
        # Both elements of a pair from one load of each.
        j = tl.arange(0, BLOCK)[None, :]
        v = tl.load(x + row + j, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(x + row + BLOCK + j, mask=inside, other=0.0).to(tl.float32)
        c = _angles(cos, position, j, cos_stride, inside)
        s = _angles(sin, position, j, sin_stride, inside)
        # The mask keeps Triton from moving all four through shared memory, and not the results.
        parts = (tl.where(inside, v * c + -w * s, 0.0), tl.where(inside, w * c + v * s, 0.0))
    else:
        for part in tl.static_range(B // BLOCK):
            parts += (
                _embed(
                    x, row, inside, cos, sin, position, cos_stride, sin_stride,
                    part * BLOCK, BLOCK, SIZE, ROTARY, INTERLEAVED,
                ),
            )  # fmt: skip
    y = tl.zeros((A, B), tl.float32)
    for part in tl.static_range(B // BLOCK):
        d = 1.0
        if SIGNS:
            k = part * BLOCK + tl.arange(0, BLOCK)[None, :]
            d = tl.load(signs + k % BLOCK_SIZE, mask=k < SIZE, other=0.0).to(tl.float32)
        y = dot_right(parts[part] * d, h[part], y, PARTS, OPERAND)
    return y


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
    one = tl.full((A, 1), 1.0, tl.float32)
    turned = q_tiles + k_tiles
    start = tl.program_id(0)
    step = tl.num_programs(0)
    for tile in tl.range(start, turned, step):
        # One body for queries and keys, so that no load stands behind a branch.
        of_q = tile < q_tiles
        x, place, heads = k, tile - q_tiles, k_heads
        token_stride, head_stride = k_token_stride, k_head_stride
        if of_q:
            x, place, heads = q, tile, q_heads
            token_stride, head_stride = q_token_stride, q_head_stride
        y = _rotate_tile(
            x, place, tokens, heads, token_stride, head_stride,
            cos, sin, positions, cos_stride, sin_stride, signs, h,
            A, B, SIZE, ROTARY, INTERLEAVED, POSITIONS, SIGNS, BLOCK, BLOCK_SIZE, PARTS, OPERAND,
        )  # fmt: skip
        # Here, since Triton 3.6 does not compile products that only branches use.
        y *= scale
        first, vectors = place * A, tokens * heads
        if KIND == NONE:
            out = k_out
            if of_q:
                out = q_out
            store_tile(
                (y,), one, out, k_scales, world, first, vectors,
                NONE, 0, False, False, A, 1, B, 1, SIZE, 1, A,
            )  # fmt: skip
        elif of_q:
            store_tile(
                (y,), one, q_out, k_scales, world, first, vectors,
                NONE, 0, False, False, A, 1, B, 1, SIZE, 1, A,
            )  # fmt: skip
        else:
            store_tile(
                (y,), one, k_out, k_scales, world, first, vectors,
                KIND, GROUP, BLOCKED, NATIVE, A, 1, B, 1, SIZE, 1, A,
            )  # fmt: skip
    if VALUES:
        start += tl.cdiv(tl.maximum(turned - start, 0), step) * step
        for tile in tl.range(start, tiles, step):
            place = tile - turned
            inside, _, row = _places(place, tokens, v_heads, v_token_stride, v_head_stride, A)
            e = tl.arange(0, V_B)[None, :]
            values = tl.load(v + row + e, mask=inside & (e < V_SIZE), other=0.0).to(tl.float32)
            store_tile(
                (values,), one, v_out, v_scales, world, place * A, tokens * v_heads,
                KIND, GROUP, BLOCKED, NATIVE, A, 1, V_B, 1, V_SIZE, 1, A,
            )  # fmt: skip
