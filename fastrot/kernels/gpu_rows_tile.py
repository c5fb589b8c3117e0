"""A tile of the rows kernel: two matrix products between a load and a store.

In pieces of ``(P, Q)`` elements, all of which are loaded before the first is multiplied. The left
product of a row of pieces is a sum over blocks of the left matrix. What follows it needs no blocks
where the right factor is Sylvester's: with S pieces side by side it is ``H_S ⊗ H_Q``, additions
and subtractions between pieces in registers, then the same small matrix for each.

In loops, where a GPU has no room for that: over blocks of columns, so that only the result is in
registers as a whole, or over chunks of the left matrix, which is then loaded for every tile.
"""

# Arguments of a kernel have Triton's types, not Python's; its tuples cannot be unpacked.
# ruff: noqa: ANN001, ANN201, ANN202, RUF005
# mypy: disable-error-code="no-untyped-def,assignment,misc"

import triton
import triton.language as tl

from fastrot.kernels.gpu_matrix import SYLVESTER, add_left, add_right, dot_left, dot_right, matrix


@triton.jit
def _place(
    i,
    j,
    remaining,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """The offset of rows i and columns j in a tile, and whether there is such an element."""
    inside = (i < ROWS) & (j < COLUMNS)
    if BOUNDED:
        # Compares vectors, not elements, so that the mask is constant along 16-byte runs.
        inside &= i // ROW_SIZE * (COLUMNS // COLUMN_SIZE) + j // COLUMN_SIZE < remaining
    return i * COLUMNS + j, inside


@triton.jit
def _load(
    x,
    signs,
    base,
    i,
    j,
    remaining,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    BOUNDED: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Rows i and columns j of a tile, times their signs; zero outside."""
    offset, inside = _place(i, j, remaining, ROWS, COLUMNS, ROW_SIZE, COLUMN_SIZE, BOUNDED)
    v = tl.load(x + base + offset, mask=inside, other=0.0)
    if SIGNS:
        d = tl.load(signs + offset % (ROW_SIZE * COLUMN_SIZE), mask=inside, other=0.0)
        v = v * d.to(v.dtype)
    return v


@triton.jit
def _store(
    y,
    out,
    signs,
    base,
    i,
    j,
    remaining,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    BOUNDED: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """The counterpart of :func:`_load`."""
    offset, inside = _place(i, j, remaining, ROWS, COLUMNS, ROW_SIZE, COLUMN_SIZE, BOUNDED)
    if SIGNS:
        d = tl.load(signs + offset % (ROW_SIZE * COLUMN_SIZE), mask=inside, other=0.0)
        y = y * d.to(tl.float32)
    tl.store(out + base + offset, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def blocks(
    table,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A matrix as COUNT² blocks of ORDER, row by row; none if KIND is 0."""
    made = ()
    if KIND != 0:
        k = tl.arange(0, ORDER)
        for n in tl.static_range(COUNT * COUNT):
            row = n // COUNT * ORDER + k[:, None]
            column = n % COUNT * ORDER + k[None, :]
            made = made + (matrix(table, row, column, SIZE, COUNT * ORDER, KIND, DTYPE),)
    return made


@triton.jit
def right_blocks(
    table,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The :func:`blocks` of a right factor; of Sylvester's one is enough."""
    if KIND == SYLVESTER:
        return blocks(table, 1, ORDER, SIZE if SIZE < ORDER else ORDER, KIND, DTYPE)
    else:
        return blocks(table, COUNT, ORDER, SIZE, KIND, DTYPE)


@triton.jit
def _butterfly(pieces, COUNT: tl.constexpr, STEP: tl.constexpr):
    """Sums and differences of the pieces that are STEP apart."""
    done = ()
    for n in tl.static_range(COUNT):
        if n // STEP % 2 == 0:
            done = done + (pieces[n] + pieces[n + STEP],)
        else:
            done = done + (pieces[n - STEP] - pieces[n],)
    return done


@triton.jit
def left_of_pieces(
    v,
    h_left,
    r: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    LEFT: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    RIGHT: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Row r of the left product of R · S pieces, ready for :func:`right_of_pieces`."""
    t = ()
    for s in tl.static_range(S):
        if LEFT == 0:
            t = t + (v[r * S + s],)
        else:
            y = tl.zeros((P, Q), tl.float32)
            y = dot_left(h_left[r * R], v[s], y, PARTS, OPERAND)
            for k in tl.static_range(1, R):
                y = add_left(h_left[r * R + k], v[k * S + s], y, PARTS, OPERAND)
            t = t + (y,)
    if RIGHT == SYLVESTER:
        if S > 1:
            t = _butterfly(t, S, 1)
        if S > 2:
            t = _butterfly(t, S, 2)
        if S > 4:
            t = _butterfly(t, S, 4)
        if S > 8:
            t = _butterfly(t, S, 8)
    return t


@triton.jit
def right_of_pieces(
    t,
    h_right,
    s: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    RIGHT: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Piece s of the right product of a row of S pieces."""
    y = tl.zeros((P, Q), tl.float32)
    if RIGHT == SYLVESTER:
        y = dot_right(t[s], h_right[0], y, PARTS, OPERAND)
    else:
        y = dot_right(t[0], h_right[s], y, PARTS, OPERAND)
        for k in tl.static_range(1, S):
            y = add_right(t[k], h_right[k * S + s], y, PARTS, OPERAND)
    return y


@triton.jit
def tile_in_pieces(
    x,
    out,
    signs,
    h_left,
    h_right,
    scale,
    base,
    remaining,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    RIGHT_SIZE: tl.constexpr,
    RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
    SIGNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    MIDDLE_PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE_OPERAND: tl.constexpr,
):
    """R · S pieces of (P, Q); ``h_left`` and ``h_right`` are the :func:`blocks` of the factors."""
    p = tl.arange(0, P)[:, None]
    q = tl.arange(0, Q)[None, :]
    v = ()
    for n in tl.static_range(R * S):
        piece = _load(
            x, signs, base, n // S * P + p, n % S * Q + q, remaining,
            ROWS, COLUMNS, LEFT_SIZE, RIGHT_SIZE, BOUNDED,
            SIGNS and not TRANSPOSE,
        )  # fmt: skip
        v = v + (piece,)
    for r in tl.static_range(R):
        t = left_of_pieces(v, h_left, r, P, R, LEFT, Q, S, RIGHT, PARTS, OPERAND)
        for s in tl.static_range(S):
            y = right_of_pieces(t, h_right, s, P, Q, S, RIGHT, MIDDLE_PARTS, MIDDLE_OPERAND)
            _store(
                y * scale, out, signs, base, r * P + p, s * Q + q, remaining,
                ROWS, COLUMNS, LEFT_SIZE, RIGHT_SIZE, BOUNDED, SIGNS and TRANSPOSE,
            )  # fmt: skip


@triton.jit
def tile_in_loops(
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
    LEFT_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    B: tl.constexpr,
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
    """BLOCK columns of the tile at a time if BLOCK < B, else CHUNK rows."""
    i = tl.arange(0, A)[:, None]
    j = tl.arange(0, B)[None, :]
    y = tl.zeros((A, B), tl.float32)
    if BLOCK < B:
        for start in tl.range(0, COLUMNS, BLOCK):
            k = start + tl.arange(0, BLOCK)
            t = _load(
                x, signs, base, i, k[None, :], remaining,
                ROWS, COLUMNS, LEFT_SIZE, RIGHT_SIZE, BOUNDED,
                SIGNS and not TRANSPOSE,
            )  # fmt: skip
            if LEFT != 0:
                t = dot_left(h_left[0], t, tl.zeros((A, BLOCK), tl.float32), PARTS, OPERAND)
            h = matrix(right, k[:, None], j, RIGHT_SIZE, B, RIGHT, MIDDLE_OPERAND)
            y = dot_right(t, h, y, MIDDLE_PARTS, MIDDLE_OPERAND)
    else:
        t = tl.zeros((A, B), tl.float32)
        for start in tl.range(0, ROWS, CHUNK):
            k = start + tl.arange(0, CHUNK)
            v = _load(
                x, signs, base, k[:, None], j, remaining,
                ROWS, COLUMNS, LEFT_SIZE, RIGHT_SIZE, BOUNDED,
                SIGNS and not TRANSPOSE,
            )  # fmt: skip
            h = matrix(left, i, k[None, :], LEFT_SIZE, A, LEFT, OPERAND)
            t = add_left(h, v, t, PARTS, OPERAND)
        y = dot_right(t, h_right[0], y, MIDDLE_PARTS, MIDDLE_OPERAND)
    _store(
        y * scale, out, signs, base, i, j, remaining,
        ROWS, COLUMNS, LEFT_SIZE, RIGHT_SIZE, BOUNDED, SIGNS and TRANSPOSE,
    )  # fmt: skip
