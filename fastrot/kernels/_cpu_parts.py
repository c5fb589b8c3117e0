# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
"""Parts of the CPU kernels: one side of a panel, and the ways into and out of it.

Addresses, leading dimensions (``ld``) and steps are in bytes; ``one`` is a number of the compute
type.
"""

from fastrot.kernels._cpu_blocks import (
    COLUMNS,
    TABLES,
    accumulate,
    butterfly,
    copy_one,
    finish,
    lanes_of,
    narrow,
    tabulate,
    widen,
    word,
)
from fastrot.kernels._cpu_compile import part
from fastrot.kernels._cpu_vectors import FLOAT32, FLOAT64, LOG_RADIX, VECTOR_BYTES

LOG_PART = 8
"""Vectors of a row that go through all their stages while they are in the first level."""
FAR_LOG_RADIX = 3
"""Of rows far apart no more than the ways of a cache set: they may all fall into one."""
LEVEL1_BYTES = 1 << 14
"""Stages whose blocks are no larger run block by block."""
TURN = 64
"""Elements of a row that are turned into columns at a time."""


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
def stages(panel, log, until, widest, ld, vectors, factor, one):
    """The butterflies of strides 2^(log - 1) … 2^until on a panel of 2^log rows, times ``factor``.

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
                    if log == until and factor != one:
                        butterfly(at + j * VECTOR_BYTES, ld << log, 1 << bits, factor, 1, one)
                    else:
                        butterfly(at + j * VECTOR_BYTES, ld << log, 1 << bits, one, 0, one)
        blocks <<= bits


@part
def columns(panel, rows, ld, vectors, bases, codes, work, one):
    """Transform the columns of a panel of ``rows``, ``vectors`` vectors wide, in place."""
    stride, blocks = rows, 1
    at_bases, count = bases
    for index in range(count):
        m = word(at_bases, index)
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
            stages(panel + (block << top) * ld, top, until, widest, ld, vectors, one, one)
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
def narrow_rows(panel, height, ld, width, side, turned, work, one):
    """Transform blocks of the rows of a panel whose power of two is smaller than a vector.

    The factors that end the size, of order ``tail`` together, act on blocks that are turned:
    ``COLUMNS`` vectors of them lie side by side in the panel ``turned``. Between the elements that
    those before meet lie whole vectors.
    """
    size, _, tail, at_bases, count, codes = side
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    per_row = width // size
    heads, outer = 0, 1
    while outer * tail < size:
        outer *= word(at_bases, heads)
        heads += 1
    bases = at_bases + 8 * heads, count - heads
    if heads:
        for row in range(height):
            for block in range(per_row):
                at = panel + row * ld + block * size * item
                head = at_bases, heads
                columns(at, outer, tail * item, tail // lanes, head, codes, work, one)
        for index in range(heads):
            codes += word(at_bases, index) ** 2 // 4
        size, per_row = tail, per_row * outer
    group = COLUMNS * lanes
    pitch = group * item
    for first in range(0, height * per_row, group):
        count = min(group, height * per_row - first)
        for back in range(2):
            _turn(panel, ld, per_row, size, item, first, count, turned, pitch, back, one)
            if not back:
                vectors = (count + lanes - 1) // lanes
                columns(turned, size, pitch, vectors, bases, codes, work, one)


@part
def load(src, kind, src_item, dst, count, factor, weights, moving, one):
    """Widen ``count`` elements times ``factor`` and a row (moving = 1) or a vector of weights."""
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    step = moving * VECTOR_BYTES
    i = 0
    while i < count:
        here, there, at = src + i * src_item, dst + i * item, weights + moving * i * item
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
def save(src, dst, kind, dst_item, count, factor, weights, moving, one):
    """Round ``count`` elements times factor and weights, as in :func:`load`, into storage."""
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    step = moving * VECTOR_BYTES
    i = 0
    while i < count:
        here, there, at = src + i * item, dst + i * dst_item, weights + moving * i * item
        if i + 4 * lanes <= count:
            narrow(here, there, kind, factor, at, step, 4, one)
            i += 4 * lanes
        elif i + lanes <= count:
            narrow(here, there, kind, factor, at, step, 1, one)
            i += lanes
        else:
            narrow(here, there, kind, factor, at, step, 0, one)
            i += 1


@part
def _finish_all(src, kind, item, before, dst, dst_kind, dst_item, after, factor, radix, count, one):
    """:func:`finish` of ``count`` vectors, whole blocks of ``radix``; weights move along."""
    lanes = lanes_of(one)
    full = count - count % (1 << LOG_RADIX)
    j = 0
    while j < count:
        here, there = src + j * lanes * item, dst + j * lanes * dst_item
        old = before + j * VECTOR_BYTES if before else 0
        new = after + j * VECTOR_BYTES if after else 0
        if j < full:
            finish(here, kind, old, there, dst_kind, new, factor, radix, 1, one)
            j += 1 << LOG_RADIX
        else:
            finish(here, kind, old, there, dst_kind, new, factor, radix, 0, one)
            j += radix


@part
def wide_row(
    src, kind, item, before, dst, dst_kind, dst_item, after, factor, side, width, space, work, one
):
    """Transform the blocks of a row whose power of two is at least a vector.

    The stages within neighbouring vectors come first, so that memory is read in its order; what is
    between lies in ``dst`` where that has the compute type, else in the panel ``space``. Of sizes
    that are no powers of two ``src`` is a panel, on which the other factors act in place.
    """
    size, power, _, at_bases, factors, codes = side
    bases = at_bases, factors
    lanes = lanes_of(one)
    ones = work[1] + COLUMNS * VECTOR_BYTES
    vectors = size // lanes
    most = 1 << LOG_RADIX
    if vectors <= most or factors:
        radix = min(power // lanes, most)
        for start in range(0, factors and width // lanes, vectors):
            at, span = src + start * VECTOR_BYTES, radix * VECTOR_BYTES
            columns(at, vectors // radix, span, radix, bases, codes, work, one)
        count = width // lanes
        _finish_all(
            src, kind, item, before, dst, dst_kind, dst_item, after, factor, radix, count, one
        )
        return
    own_item = VECTOR_BYTES // lanes
    own = FLOAT64 if own_item == 8 else FLOAT32
    log = 0
    while 1 << log < vectors:
        log += 1
    near = min(log, LOG_PART)
    near += (log - near) % FAR_LOG_RADIX == 1
    for first in range(0, width // lanes, vectors):
        there = dst + first * lanes * dst_item
        panel = there if dst_kind == own else space
        # Sums of numbers such as integers are exact until they are multiplied, so that comes last.
        saved = after or panel != there
        behind = one if saved else factor
        for j in range(0, vectors, 1 << near):
            at, part = src + (first + j) * lanes * item, panel + j * VECTOR_BYTES
            old, count = before + (first + j) * VECTOR_BYTES if before else 0, 1 << near
            _finish_all(at, kind, item, old, part, own, own_item, 0, one, most, count, one)
            within = behind if near == log else one
            stages(part, near, LOG_RADIX, LOG_RADIX, VECTOR_BYTES, 1, within, one)
        stages(panel, log, near, FAR_LOG_RADIX, VECTOR_BYTES, 1, behind, one)
        if saved:
            heavy = after + first * VECTOR_BYTES if after else ones
            save(panel, there, dst_kind, dst_item, size, factor, heavy, after != 0, one)
