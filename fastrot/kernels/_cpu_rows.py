# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
"""Parts of the CPU kernels: the right side, rows of a tile.

Addresses, leading dimensions (``ld``) and steps are in bytes; ``one`` is a number of the compute
type.
"""

from fastrot.kernels._cpu_blocks import CODE_BYTES, COLUMNS, copy_one, finish, lanes_of, word
from fastrot.kernels._cpu_compile import part
from fastrot.kernels._cpu_parts import FAR_LOG_RADIX, columns, dense, load, save, stages
from fastrot.kernels._cpu_vectors import FLOAT32, FLOAT64, LOG_RADIX, VECTOR_BYTES

LOG_PART = 8
"""Vectors of a row that go through all their stages while they are in the first level."""
TURN = 64
"""Elements of a row that are turned into columns at a time."""


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
    size, _, tail, at_bases, count, codes, transposed = side
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    own = FLOAT64 if item == 8 else FLOAT32
    per_row = width // size
    heads, outer = 0, 1
    while outer * tail < size:
        outer *= word(at_bases, heads)
        heads += 1
    bases = at_bases + 8 * heads, count - heads, transposed
    if heads:
        for row in range(height):
            for block in range(per_row):
                at = panel + row * ld + block * size * item
                head = at_bases, heads, transposed
                dense(at, tail * item, outer, tail // lanes, head, codes, work, one)
        for index in range(heads):
            codes += word(at_bases, index) ** 2 // 4 * CODE_BYTES
        size, per_row = tail, per_row * outer
    group = COLUMNS * lanes
    pitch = group * item
    for first in range(0, height * per_row, group):
        count = min(group, height * per_row - first)
        for back in range(2):
            _turn(panel, ld, per_row, size, item, first, count, turned, pitch, back, one)
            if not back:
                vectors = (count + lanes - 1) // lanes
                here, no = (turned, pitch, own, 0), (0, 0, 0, 0)
                columns(
                    here, no, here, no, one, (turned, pitch), size, vectors, bases, codes, work, one
                )  # fmt: skip


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
def _power_row(src, kind, before, dst, dst_kind, after, factor, log, panel, ones, one):
    """Transform a row of 2^log vectors, more than one radix, by way of a panel.

    The stages within neighbouring vectors come first, so that memory is read in its order.
    """
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    own = FLOAT64 if item == 8 else FLOAT32
    size = 8 >> min(kind, 2)
    near = min(log, LOG_PART)
    near += (log - near) % FAR_LOG_RADIX == 1
    for j in range(0, 1 << log, 1 << near):
        at, to, count = src + j * lanes * size, panel + j * VECTOR_BYTES, 1 << near
        old = before + j * VECTOR_BYTES if before else 0
        _finish_all(at, kind, size, old, to, own, item, 0, one, 1 << LOG_RADIX, count, one)
        if near < log:
            stages(to, near, LOG_RADIX, LOG_RADIX, VECTOR_BYTES, one, one)
    until, widest = (near, FAR_LOG_RADIX) if near < log else (LOG_RADIX, LOG_RADIX)
    # Writing rows apart from each other is slow where memory is fresh.
    if panel != dst or after:
        stages(panel, log, until, widest, VECTOR_BYTES, one, one)
        save(panel, dst, dst_kind, 8 >> min(dst_kind, 2), lanes << log, factor, after, ones, one)
        return
    stages(panel, log, until, widest, VECTOR_BYTES, factor, one)


@part
def wide_row(
    src, kind, item, before, dst, dst_kind, dst_item, after, factor, side, width, space, work, one
):
    """Transform the blocks of a row whose power of two is at least a vector.

    What is between lies in ``dst`` where that has the compute type, else in the panel ``space``.
    """
    size, power, _, at_bases, count, codes, transposed = side
    bases = at_bases, count, transposed
    lanes = lanes_of(one)
    own_item = VECTOR_BYTES // lanes
    own = FLOAT64 if own_item == 8 else FLOAT32
    ones = work[1] + COLUMNS * VECTOR_BYTES
    log = 0
    while lanes << log < power:
        log += 1
    if count == 0 and log <= LOG_RADIX:
        _finish_all(
            src, kind, item, before, dst, dst_kind, dst_item, after, factor, 1 << log,
            width // lanes, one,
        )  # fmt: skip
        return
    for first in range(0, width, size):
        at, at_kind, at_item, to = src + first * item, kind, item, dst + first * dst_item
        old = before + first * own_item if before else 0
        new = after + first * own_item if after else 0
        if count:
            load(at, kind, item, space, size, one, old, ones, one)
            dense(space, power * own_item, size // power, power // lanes, bases, codes, work, one)
            at, at_kind, at_item, old = space, own, own_item, 0
        if log <= LOG_RADIX:
            _finish_all(
                at, at_kind, at_item, old, to, dst_kind, dst_item, new, factor, 1 << log,
                size // lanes, one,
            )  # fmt: skip
            continue
        panel = to if dst_kind == own else space
        for skip in range(0, size, power):
            _power_row(
                at + skip * at_item, at_kind, old + skip * own_item if old else 0,
                to + skip * dst_item, dst_kind, new + skip * own_item if new else 0, factor, log,
                panel + skip * own_item, ones, one,
            )  # fmt: skip
