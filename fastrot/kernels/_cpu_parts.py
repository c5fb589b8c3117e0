# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
"""Parts of the CPU kernels: columns of a panel, and the ways into and out of it.

Addresses, leading dimensions (``ld``) and steps are in bytes; ``one`` is a number of the compute
type.
"""

from fastrot.kernels._cpu_blocks import (
    CODE_BYTES,
    COLUMNS,
    FIXED,
    TABLES,
    accumulate,
    butterfly,
    cross,
    fixed,
    lanes_of,
    narrow,
    prefetch,
    tabulate,
    widen,
    word,
)
from fastrot.kernels._cpu_compile import part
from fastrot.kernels._cpu_vectors import FLOAT32, FLOAT64, LOG_RADIX, VECTOR_BYTES

LINE_BYTES = 64
FAR_LOG_RADIX = 3
"""Of rows far apart no more than the ways of a cache set: they may all fall into one."""
LEVEL1_BYTES = 1 << 15
"""Stages whose blocks are no larger run block by block."""


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
                row = codes + (i * groups + first) * CODE_BYTES
                if full:
                    accumulate(table, row, count, source, target, COLUMNS, one)
                else:
                    accumulate(table, row, count, source, target, 1, one)


@part
def dense(panel, ld, size, vectors, bases, codes, work, one):
    """The dense factors of columns of ``size`` elements, in place."""
    stride, blocks = size, 1
    at_bases, count, transposed = bases
    for index in range(count):
        m = word(at_bases, index)
        stride //= m
        for block in range(blocks):
            for row in range(stride):
                at = panel + (block * m * stride + row) * ld
                if m <= FIXED[-1]:
                    for j in range(vectors):
                        choice = (m - FIXED[0]) // 4 + transposed
                        fixed(at + j * VECTOR_BYTES, stride * ld, choice, one)
                else:
                    _dense(at, stride * ld, vectors, m, codes, work, one)
        blocks *= m
        codes += m * m // 4 * CODE_BYTES


@part
def stages(panel, log, until, widest, ld, factor, one):
    """The butterflies of strides 2^(log - 1) … 2^until on 2^log vectors, times ``factor``.

    Vectors are ``ld`` apart. ``widest`` is the logarithm of the largest radix. Stages are split
    evenly over the passes.
    """
    blocks = 1
    while log > until:
        passes = (log - until + widest - 1) // widest
        bits = (log - until + passes - 1) // passes
        log -= bits
        for block in range(blocks):
            for row in range(1 << log):
                at = panel + ((block << log + bits) + row) * ld
                if log == until and factor != one:
                    butterfly(at, ld << log, 1 << bits, factor, 1, one)
                else:
                    butterfly(at, ld << log, 1 << bits, one, 0, one)
        blocks <<= bits


@part
def _pass(source, before, target, after, factor, log, bits, vectors, one):
    """The butterflies of strides 2^(log - 1) … 2^(log - bits) on 2^log rows, into other rows."""
    lanes = lanes_of(one)
    stride, radix = 1 << log - bits, 1 << bits
    own = FLOAT64 if lanes * 8 == VECTOR_BYTES else FLOAT32
    weighed = before[0] or before[2] or after[0] or after[2] or factor != one
    if source == target and source[2] == own and not weighed:
        for row in range(stride if bits else 0):
            for j in range(vectors):
                at = source[0] + row * source[1] + j * VECTOR_BYTES
                butterfly(at, source[1] * stride, radix, one, 0, one)
        return
    for row in range(stride):
        at, ld, kind, soon = source
        to, to_ld, to_kind, later = target
        for i in range(0, radix * stride if soon else 0, stride):
            for line in range(0, vectors * lanes * (8 >> min(kind, 2)), LINE_BYTES):
                prefetch(at + (row + i + soon) * ld + line, 0)
        for i in range(0, radix * stride if later else 0, stride):
            for line in range(0, vectors * lanes * (8 >> min(to_kind, 2)), LINE_BYTES):
                prefetch(to + (row + i + later) * to_ld + line, 1)
        for j in range(vectors):
            at, to = source[0], target[0]
            cols, cols_ld, rows, step = before
            at += row * ld + j * lanes * (8 >> min(kind, 2))
            if cols:
                cols += row * cols_ld + j * VECTOR_BYTES
            if rows:
                rows += row * step
            new, new_ld, news, new_step = after
            to += row * to_ld + j * lanes * (8 >> min(to_kind, 2))
            if new:
                new += row * new_ld + j * VECTOR_BYTES
            if news:
                news += row * new_step
            cross(
                at, ld * stride, kind, cols, cols_ld * stride, rows, step * stride,
                to, to_ld * stride, to_kind, new, new_ld * stride, news, new_step * stride,
                factor, radix, one,
            )  # fmt: skip


@part
def _passes(source, before, between, target, after, factor, log, count, vectors, one):
    """All butterflies of 2^log rows in so many passes; what is between lies in a panel."""
    nothing = (0, 0, 0, 0)
    rows = 1 << log
    for left in range(count, 1, -1):
        bits = (log + left - 1) // left
        for skip in range(0, rows, 1 << log):
            here = (source[0] + skip * source[1], source[1], source[2], source[3])
            there = (between[0] + skip * between[1], between[1], between[2], 0)
            _pass(here, before, there, nothing, one, log, bits, vectors, one)
        source, before = between, nothing
        log -= bits
    cols, cols_ld, news, step = after
    for skip in range(0, rows, 1 << log):
        here = (source[0] + skip * source[1], source[1], source[2], source[3])
        there = (target[0] + skip * target[1], target[1], target[2], target[3])
        new = (
            cols + skip * cols_ld if cols else 0, cols_ld, news + skip * step if news else 0, step
        )  # fmt: skip
        _pass(here, before, there, new, factor, log, log, vectors, one)


@part
def columns(
    source, before, target, after, factor, panel, size, vectors, bases, codes, work, one
):  # fmt: skip
    """Transform columns of ``size`` elements from a matrix into another, by way of a panel.

    The first pass over the elements reads and weighs them, unless there are dense factors: these
    act on the panel. The last one weighs, rounds and writes them. The matrices may be the same.
    """
    own = FLOAT64 if lanes_of(one) * 8 == VECTOR_BYTES else FLOAT32
    between, nothing = (panel[0], panel[1], own, 0), (0, 0, 0, 0)
    ld, blocks = panel[1], 1
    dense(panel[0], ld, size, vectors, bases, codes, work, one)
    for index in range(bases[1]):
        blocks *= word(bases[0], index)
    log = 0
    while blocks << log < size:
        log += 1
    near = min(log, LOG_RADIX)
    while near < log and ld << near + 1 <= LEVEL1_BYTES:
        near += 1
    while log > near:
        passes = (log - near + FAR_LOG_RADIX - 1) // FAR_LOG_RADIX
        bits = (log - near + passes - 1) // passes
        for block in range(blocks):
            here = (source[0] + (block << log) * source[1], source[1], source[2], source[3])
            there = (panel[0] + (block << log) * ld, ld, own, 0)
            _pass(here, before, there, nothing, one, log, bits, vectors, one)
        source, before = between, nothing
        log -= bits
        blocks <<= bits
    left = max(1, (log + LOG_RADIX - 1) // LOG_RADIX)
    cols, cols_ld, rows, step = after
    for block in range(blocks):
        skip = block << log
        within = (panel[0] + skip * ld, ld, own, 0)
        here = (source[0] + skip * source[1], source[1], source[2], source[3])
        there = (target[0] + skip * target[1], target[1], target[2], target[3])
        _passes(
            here, before, within, there, (cols, cols_ld, rows + skip * step if rows else 0, step),
            factor, log, left, vectors, one,
        )  # fmt: skip


@part
def load(src, kind, src_item, dst, count, factor, weights, ones, one):
    """Widen ``count`` elements times ``factor`` and a row of weights, or a vector of ones."""
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    step = VECTOR_BYTES if weights else 0
    i = 0
    while i < count:
        here, there = src + i * src_item, dst + i * item
        at = weights + i * item if weights else ones
        if i + 4 * lanes <= count:
            widen(here, there, kind, factor, at, step, 4, one)
            i += 4 * lanes
        elif i + lanes <= count:
            widen(here, there, kind, factor, at, step, 1, one)
            i += lanes
        else:
            widen(here, there, kind, factor, at, step, 0, one)
            i += 1


@part
def save(src, dst, kind, dst_item, count, factor, weights, ones, one):
    """Round ``count`` elements times factor and weights, as in :func:`load`, into storage."""
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    step = VECTOR_BYTES if weights else 0
    i = 0
    while i < count:
        here, there = src + i * item, dst + i * dst_item
        at = weights + i * item if weights else ones
        if i + 4 * lanes <= count:
            narrow(here, there, kind, factor, at, step, 4, one)
            i += 4 * lanes
        elif i + lanes <= count:
            narrow(here, there, kind, factor, at, step, 1, one)
            i += lanes
        else:
            narrow(here, there, kind, factor, at, step, 0, one)
            i += 1
