"""One kernel from activations to codes: prologue, Hadamard transform, epilogue.

    z = prologue(x),    y = z · D · (I ⊗ H),    codes, scales = quantise(y)

The prologue is nothing, an activation times a gate, or RMSNorm. A tile holds whole tokens, so that
the scale of a token and the norm of a token are known where they are needed: the norm is one factor
of a whole token, which commutes with the transform and is applied after it. What is neither input
nor output stays in registers and shared memory, in float32.

A token of n elements, in blocks of H_a ⊗ H_b, lies in a tile as ``(n / columns, columns)``, its
memory order. The columns are b, or several b if there is no left factor. See
:mod:`fastrot.kernels.gpu_rows` for the products, and :mod:`fastrot.kernels.gpu_rows_tile` for the
pieces and loops in which they are made.
"""

# Arguments of a kernel have Triton's types, not Python's; its tuples cannot be unpacked.
# ruff: noqa: ANN001, ANN201, ANN202, RUF005
# mypy: disable-error-code="no-untyped-def,assignment,misc"

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastrot.kernels.gpu_formats import NONE, store_piece, store_tile
from fastrot.kernels.gpu_matrix import add_left, dot_left, dot_right, matrix
from fastrot.kernels.gpu_rows_tile import (
    blocks,
    left_of_pieces,
    right_blocks,
    right_of_pieces,
)

PLAIN = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
RMSNORM = tl.constexpr(4)
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3}


@triton.jit
def _times_sigmoid(v, w, FAST: tl.constexpr):
    """V · sigmoid(w), to two units in the last place of float32."""
    if FAST:
        return libdevice.fast_dividef(v, 1.0 + libdevice.fast_expf(-w))
    else:
        return v / (1.0 + tl.exp(-w))


@triton.jit
def activate(v, KIND: tl.constexpr, FAST: tl.constexpr):
    """SiLU, GELU by the error function, or GELU by tanh, which is a sigmoid."""
    if KIND == SILU:
        return _times_sigmoid(v, v, FAST)
    elif KIND == GELU:
        return v * (0.5 + 0.5 * tl.erf(v * 0.7071067811865476))
    else:
        return _times_sigmoid(v, v * (1.5957691216057308 + 0.07135481627260025 * v * v), FAST)


@triton.jit
def _load(
    x,
    up,
    gamma,
    signs,
    x_stride,
    up_stride,
    remaining,
    i,
    j,
    COLUMNS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FAST: tl.constexpr,
    GAMMA: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Rows i and columns j of a tile after the prologue, zero outside; the squares of x."""
    token = i // TOKEN_ROWS
    element = (i - token * TOKEN_ROWS) * COLUMNS + j
    inside = (i < TOKENS * TOKEN_ROWS) & (token < remaining) & (j < COLUMNS)
    v = tl.load(x + token * x_stride + element, mask=inside, other=0.0)
    squares = 0.0
    if PROLOGUE == RMSNORM:
        squares = v.to(tl.float32) * v.to(tl.float32)
    elif PROLOGUE != PLAIN:
        u = tl.load(up + token * up_stride + element, mask=inside, other=0.0)
        v = activate(v.to(tl.float32), PROLOGUE, FAST) * u.to(tl.float32)
    if GAMMA:
        v = v.to(tl.float32) * tl.load(gamma + element, mask=inside, other=0.0).to(tl.float32)
    if SIGNS:
        v = v * tl.load(signs + element % BLOCK_SIZE, mask=inside, other=0.0).to(v.dtype)
    return v, squares


@triton.jit
def _scales(
    squares,
    scale,
    eps,
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """The scale of every row, ``(P, 1)``, with the norm of its token, from the squares of rows."""
    by_row = tl.zeros((P,), tl.float32) + scale
    if PROLOGUE == RMSNORM:
        if TOKENS == 1:
            square = tl.zeros((P,), tl.float32) + tl.sum(squares, axis=0)
        elif TOKEN_ROWS == 1:
            square = squares
        else:
            token = tl.arange(0, P) // TOKEN_ROWS
            same = token[:, None] == token[None, :]
            square = tl.sum(tl.where(same, squares[None, :], 0.0), axis=1)
        by_row *= tl.rsqrt(square / (TOKEN_ROWS * COLUMNS) + eps)
    return by_row[:, None]


@triton.jit
def _fused_tile(
    x,
    up,
    gamma,
    signs,
    out,
    scales,
    h_left,
    h_right,
    left,
    right,
    world,
    scale,
    eps,
    x_stride,
    up_stride,
    first,
    tokens,
    A: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    RIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FAST: tl.constexpr,
    GAMMA: tl.constexpr,
    SIGNS: tl.constexpr,
    PARTS: tl.constexpr,
    MIDDLE_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE_OPERAND: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = (LEFT_SIZE if LEFT != 0 else 1) * RIGHT_SIZE
    R: tl.constexpr = A // P
    S: tl.constexpr = B // Q
    i = tl.arange(0, P)
    j = tl.arange(0, Q)[None, :]
    base = tl.cast(first, tl.int64)
    x += base * x_stride
    up += base * up_stride
    squares = tl.zeros((P,), tl.float32)
    done = ()
    if BLOCK < B:
        y = tl.zeros((A, B), tl.float32)
        for start in tl.range(0, COLUMNS, BLOCK):
            k = start + tl.arange(0, BLOCK)
            t, s = _load(
                x, up, gamma, signs, x_stride, up_stride, tokens - first, i[:, None], k[None, :],
                COLUMNS, TOKEN_ROWS, TOKENS, BLOCK_SIZE, PROLOGUE, FAST, GAMMA, SIGNS,
            )  # fmt: skip
            if PROLOGUE == RMSNORM:
                squares += tl.sum(s, axis=1)
            if LEFT != 0:
                t = dot_left(h_left[0], t, tl.zeros((A, BLOCK), tl.float32), PARTS, OPERAND)
            h = matrix(right, k[:, None], j, RIGHT_SIZE, B, RIGHT, MIDDLE_OPERAND)
            y = dot_right(t, h, y, MIDDLE_PARTS, MIDDLE_OPERAND)
        done = (y,)
    elif CHUNK < A:
        if PROLOGUE == RMSNORM:
            # A loop of its own: beside products, Triton 3.6 loses chunks of the sum on Hopper.
            sums = tl.zeros((CHUNK, B), tl.float32)
            for start in tl.range(0, TOKEN_ROWS, CHUNK):
                k = start + tl.arange(0, CHUNK)
                v, s = _load(
                    x, up, gamma, signs, x_stride, up_stride, tokens - first, k[:, None], j,
                    COLUMNS, TOKEN_ROWS, TOKENS, BLOCK_SIZE, PROLOGUE, FAST, False, False,
                )  # fmt: skip
                sums += s
            # Of the only token in the tile: which row does not matter.
            squares = tl.where(i == 0, tl.sum(tl.sum(sums, axis=1), axis=0), 0.0)
        t = tl.zeros((A, B), tl.float32)
        for start in tl.range(0, TOKEN_ROWS, CHUNK):
            k = start + tl.arange(0, CHUNK)
            v, s = _load(
                x, up, gamma, signs, x_stride, up_stride, tokens - first, k[:, None], j,
                COLUMNS, TOKEN_ROWS, TOKENS, BLOCK_SIZE, PROLOGUE, FAST, GAMMA, SIGNS,
            )  # fmt: skip
            h = matrix(left, i[:, None], k[None, :], LEFT_SIZE, A, LEFT, OPERAND)
            t = add_left(h, v, t, PARTS, OPERAND)
        y = tl.zeros((A, B), tl.float32)
        done = (dot_right(t, h_right[0], y, MIDDLE_PARTS, MIDDLE_OPERAND),)
    else:
        v = ()
        sums = tl.zeros((P, Q), tl.float32)
        for n in tl.static_range(R * S):
            piece, squared = _load(
                x, up, gamma, signs, x_stride, up_stride, tokens - first,
                n // S * P + i[:, None], n % S * Q + j,
                COLUMNS, TOKEN_ROWS, TOKENS, BLOCK_SIZE, PROLOGUE, FAST, GAMMA, SIGNS,
            )  # fmt: skip
            v = v + (piece,)
            sums += squared
        if PROLOGUE == RMSNORM:
            squares = tl.sum(sums, axis=1)
        # What does not wait for the scale of a token leaves its registers at once.
        SOON: tl.constexpr = R * S > 1 and (KIND == NONE or GROUP != 0)
        if SOON:
            by_row = _scales(squares, scale, eps, P, COLUMNS, TOKEN_ROWS, TOKENS, PROLOGUE)
        for r in tl.static_range(R):
            t = left_of_pieces(v, h_left, r, P, R, LEFT, Q, S, RIGHT, PARTS, OPERAND)
            for s in tl.static_range(S):
                y = right_of_pieces(t, h_right, s, P, Q, S, RIGHT, MIDDLE_PARTS, MIDDLE_OPERAND)
                if SOON:
                    store_piece(
                        y, 1.0, by_row, out, scales, world, first, tokens, r * P + i[:, None],
                        s * Q, KIND, GROUP, BLOCKED, NATIVE, P, Q, COLUMNS, TOKEN_ROWS, TOKENS,
                    )  # fmt: skip
                else:
                    done = done + (y,)
    if len(done) > 0:
        by_row = _scales(squares, scale, eps, P, COLUMNS, TOKEN_ROWS, TOKENS, PROLOGUE)
        store_tile(
            done, by_row, out, scales, world, first, tokens,
            KIND, GROUP, BLOCKED, NATIVE, P, R, Q, S, COLUMNS, TOKEN_ROWS, TOKENS,
        )  # fmt: skip


@triton.jit
def _fused_kernel(
    x,
    up,
    gamma,
    signs,
    out,
    scales,
    left,
    right,
    global_scale,
    scale,
    eps,
    x_stride,
    up_stride,
    tokens,
    A: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    RIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FAST: tl.constexpr,
    GAMMA: tl.constexpr,
    SIGNS: tl.constexpr,
    PARTS: tl.constexpr,
    MIDDLE_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE_OPERAND: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKED: tl.constexpr,
    GLOBAL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    h_left = ()
    h_right = ()
    world = 1.0
    if GLOBAL:
        world = tl.load(global_scale)
    if CHUNK == A:
        h_left = blocks(left, A // P, P, LEFT_SIZE, LEFT, OPERAND)
    if BLOCK == B:
        h_right = right_blocks(right, B // Q, Q, RIGHT_SIZE, RIGHT, MIDDLE_OPERAND)
    start = tl.program_id(0)
    stop = start + 1
    if PERSISTENT:
        stop = tl.cdiv(tokens, TOKENS)
    for tile in tl.range(start, stop, tl.num_programs(0)):
        _fused_tile(
            x, up, gamma, signs, out, scales, h_left, h_right, left, right,
            world, scale, eps, x_stride, up_stride, tile * TOKENS, tokens,
            A, P, B, Q, COLUMNS, TOKEN_ROWS, TOKENS, LEFT_SIZE, LEFT, RIGHT_SIZE, RIGHT,
            CHUNK, BLOCK, PROLOGUE, FAST, GAMMA, SIGNS, PARTS, MIDDLE_PARTS, OPERAND,
            MIDDLE_OPERAND, KIND, GROUP, BLOCKED, NATIVE,
        )  # fmt: skip
