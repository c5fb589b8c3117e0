# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, D417
"""Numba kernels of the CPU implementation: panels in cache, vectors across lanes.

A *panel* is a small row-major matrix of float32 or float64 that stays in cache. :func:`sweep`
cuts a matrix into tiles and, for each, fills a panel (widening the storage dtype), transforms its
rows (right side) and its columns (left side), and writes it back with one rounding. Addresses,
leading dimensions (``ld``) and steps are in bytes; ``one`` is a number of the compute type.
"""

from fastrot.kernels._cpu_blocks import (
    COLUMNS,
    TABLES,
    accumulate,
    address_of,
    butterfly,
    chunk,
    copy_one,
    lanes_of,
    narrow,
    prefetch,
    tabulate,
    widen,
)
from fastrot.kernels._cpu_compile import kernel, part
from fastrot.kernels._cpu_vectors import LOG_RADIX, VECTOR_BYTES

FAR_LOG_RADIX = 3
"""Of rows far apart no more than the ways of a cache set: they may all fall into one."""
LEVEL1_BYTES = 1 << 14
"""Stages whose blocks are no larger run block by block."""
TURN = 64
"""Elements of a row that are turned into columns at a time."""
LINE_BYTES = 64
PLAN_WORDS = 18
"""Of a plan, before the bases of both sides."""
AHEAD = 16
"""Rows by which prefetching precedes the access to a narrow tile."""


@part
def _dense(base, step, vectors, m, codes, work, one):
    """A ±1 matrix of order ``m`` across rows ``step`` apart, ``vectors`` wide, in place.

    Inputs are taken four at a time ("four Russians"): their sixteen signed sums are tabulated and
    each output adds one of them, so m / 4 additions per output instead of m.
    """
    wide = COLUMNS * VECTOR_BYTES
    table, zeros = work
    sums = table + TABLES * 16 * wide
    groups = m // 4
    for column in range(0, vectors, COLUMNS):
        at = base + column * VECTOR_BYTES
        full = vectors - column >= COLUMNS
        for first in range(0, groups, TABLES):
            count = min(TABLES, groups - first)
            for g in range(count):
                source, entry = at + 4 * (first + g) * step, table + g * 16 * wide
                if full:
                    tabulate(source, step, entry, COLUMNS, one)
                else:
                    tabulate(source, step, entry, 1, one)
            for i in range(m):
                source = zeros if first == 0 else sums + i * wide
                target = at + i * step if first + count == groups else sums + i * wide
                row = codes + i * groups + first
                if full:
                    accumulate(table, row, count, source, target, COLUMNS, one)
                else:
                    accumulate(table, row, count, source, target, 1, one)


@part
def _stages(panel, log, until, widest, ld, vectors, one):
    """The butterflies of strides 2^(log - 1) … 2^until on a panel of 2^log rows.

    ``widest`` is the logarithm of the largest radix. Stages are split evenly over the passes.
    """
    blocks = 1
    while log > until:
        passes = (log - until + widest - 1) // widest
        bits = (log - until + passes - 1) // passes
        log -= bits
        for block in range(blocks):
            for row in range(1 << log):
                at = panel + ((block << log + bits) + row) * ld
                for j in range(vectors):
                    butterfly(at + j * VECTOR_BYTES, ld << log, 1 << bits, one)
        blocks <<= bits


@part
def _columns(panel, rows, ld, vectors, bases, codes, work, one):
    """Transform the columns of a panel of ``rows``, ``vectors`` vectors wide, in place."""
    stride, blocks = rows, 1
    for m in bases:
        stride //= m
        for block in range(blocks):
            for row in range(stride):
                at = panel + (block * m * stride + row) * ld
                _dense(at, stride * ld, vectors, m, codes, work, one)
        blocks *= m
        codes += m * m // 4
    log = 0
    while 1 << log < stride:
        log += 1
    inner = log
    while inner and ld << inner > LEVEL1_BYTES:
        inner -= 1
    if log <= 2 * LOG_RADIX:
        inner = log
    for near in range(2):
        top, until = (inner, 0) if near else (log, inner)
        widest = LOG_RADIX if near else FAR_LOG_RADIX
        for block in range(blocks):
            _stages(panel + (block << top) * ld, top, until, widest, ld, vectors, one)
        blocks <<= top - until


@part
def _turn(panel, ld, per_row, size, item, first, count, turned, pitch, back, one):
    """Copy blocks of rows of a panel into the columns of ``turned``, or back."""
    for start in range(0, size, TURN):
        for lane in range(count):
            row, block = divmod(first + lane, per_row)
            here = panel + row * ld + block * size * item
            there = turned + lane * item
            for i in range(start, min(start + TURN, size)):
                if back:
                    copy_one(there + i * pitch, here + i * item, one)
                else:
                    copy_one(here + i * item, there + i * pitch, one)


@part
def _rows(panel, height, ld, width, side, turned, work, one):
    """Transform every block of the rows of a panel, in place.

    If the power of two that ends the factors of the size is smaller than a vector, the factors that
    end it, of order ``tail`` together, act on blocks that are turned: ``COLUMNS`` vectors of them
    lie side by side in the panel ``turned``. Between the elements that those before meet lie whole
    vectors.
    """
    size, power, tail, bases, codes = side
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    per_row = width // size
    if power < lanes:
        heads, outer = 0, 1
        while outer * tail < size:
            outer *= bases[heads]
            heads += 1
        if heads:
            for row in range(height):
                for block in range(per_row):
                    at = panel + row * ld + block * size * item
                    head = bases[:heads]
                    _columns(at, outer, tail * item, tail // lanes, head, codes, work, one)
            for m in bases[:heads]:
                codes += m * m // 4
            size, per_row = tail, per_row * outer
            bases = bases[heads:]
        group = COLUMNS * lanes
        pitch = group * item
        for first in range(0, height * per_row, group):
            count = min(group, height * per_row - first)
            for back in range(2):
                _turn(panel, ld, per_row, size, item, first, count, turned, pitch, back, one)
                if not back:
                    vectors = (count + lanes - 1) // lanes
                    _columns(turned, size, pitch, vectors, bases, codes, work, one)
        return
    radix = min(power // lanes, 1 << LOG_RADIX)
    span = radix * VECTOR_BYTES
    steps = size * item // span
    for row in range(height):
        start = panel + row * ld
        if steps > 1:
            for block in range(per_row):
                at = start + block * size * item
                _columns(at, steps, span, radix, bases, codes, work, one)
        for j in range(per_row * steps):
            chunk(start + j * span, radix, one)


@part
def _load(src, kind, src_item, dst, count, factor, weights, moving, one):
    """Widen ``count`` elements times ``factor`` and a row (moving = 1) or a vector of weights."""
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    full = count - count % lanes
    for i in range(0, full, lanes):
        at = weights + moving * i * item
        widen(src + i * src_item, dst + i * item, kind, factor, at, 0, one)
    for i in range(full, count):
        at = weights + moving * i * item
        widen(src + i * src_item, dst + i * item, kind, factor, at, 1, one)


@part
def _save(src, dst, kind, dst_item, count, factor, weights, moving, one):
    """Round ``count`` elements times factor and weights, as in :func:`_load`, into storage."""
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    full = count - count % lanes
    for i in range(0, full, lanes):
        at = weights + moving * i * item
        narrow(src + i * item, dst + i * dst_item, kind, factor, at, 0, one)
    for i in range(full, count):
        at = weights + moving * i * item
        narrow(src + i * item, dst + i * dst_item, kind, factor, at, 1, one)


@kernel
def sweep(
    first,
    last,
    src_at,
    src_kind,
    src_item,
    src_ld,
    dst_at,
    dst_kind,
    dst_item,
    dst_ld,
    plan,
    before_rows,
    before_cols,
    after_rows,
    after_cols,
    memory,
    constants,
    scale,
):
    """Tiles ``first`` to ``last - 1`` of ``dst = scale · A' Lᵀ (A src B) R B'``.

    Nothing here is a tuple: Numba takes longer to unpack some than to transform a short row.

    Args:
        src_at, src_kind, src_item, src_ld: a matrix, as a ``cpu.Matrix``; so is dst.
        plan: int64 words: the matrix's rows and columns and a tile's, the columns that the left
            side does at once, the panel's ld and bytes and those of ``turned``; of each side size,
            power, tail, number of bases and address of codes; the bases of both.
        before_rows, before_cols, after_rows, after_cols: the diagonals A, B, A' and B': arrays that
            recur with their length, empty for the identity.
        memory: bytes for the panel, ``turned`` and ``work``.
        constants: ``COLUMNS`` vectors of zeros, one of ones; its dtype is the compute type.
        scale: float64.
    """
    rows, cols, tile_rows, tile_cols = plan[0], plan[1], plan[2], plan[3]
    strip, ld, panel_bytes, turned_bytes = plan[4], plan[5], plan[6], plan[7]
    split = PLAN_WORDS + plan[11]
    left_size, left_codes, left_bases = plan[8], plan[12], plan[PLAN_WORDS:split]
    right = plan[13], plan[14], plan[15], plan[split:], plan[17]
    one = constants[-1]
    scale = type(one)(scale)
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    zeros = address_of(constants)
    ones = zeros + COLUMNS * VECTOR_BYTES
    panel = (address_of(memory) + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
    turned = panel + panel_bytes
    work = (turned + turned_bytes, zeros)
    across = (cols + tile_cols - 1) // tile_cols
    batch = 1 if right[1] >= lanes else tile_rows
    reading = AHEAD * src_ld if left_size > 1 and tile_cols < cols else 0
    writing = AHEAD * dst_ld if reading else 0
    for tile in range(first, last):
        top, edge = tile // across * tile_rows, tile % across * tile_cols
        height, width = min(tile_rows, rows - top), min(tile_cols, cols - edge)
        factor, weights, moving = one, ones, 0
        if before_cols.size:
            weights, moving = address_of(before_cols) + edge % before_cols.size * item, 1
        for start in range(0, height, batch):
            for row in range(start, min(start + batch, height)):
                if before_rows.size:
                    factor = before_rows[(top + row) % before_rows.size]
                at, here = src_at + (top + row) * src_ld + edge * src_item, panel + row * ld
                for line in range(0, reading and width * src_item, LINE_BYTES):
                    prefetch(at + reading + line, 0)
                _load(at, src_kind, src_item, here, width, factor, weights, moving, one)
            if right[0] > 1:
                here, rest = panel + start * ld, height - start
                _rows(here, min(batch, rest), ld, width, right, turned, work, one)
        factor, weights, moving = scale, ones, 0
        if after_cols.size:
            weights, moving = address_of(after_cols) + edge % after_cols.size * item, 1
        for start in range(0, width, strip):
            count = min(strip, width - start)
            here = panel + start * item
            if left_size > 1:
                vectors = (count + lanes - 1) // lanes
                _columns(here, left_size, ld, vectors, left_bases, left_codes, work, one)
            for row in range(height):
                if after_rows.size:
                    factor = scale * after_rows[(top + row) % after_rows.size]
                at = dst_at + (top + row) * dst_ld + (edge + start) * dst_item
                for line in range(0, writing and count * dst_item, LINE_BYTES):
                    prefetch(at + writing + line, 1)
                here = panel + row * ld + start * item
                heavy = weights + moving * start * item
                _save(here, at, dst_kind, dst_item, count, factor, heavy, moving, one)
