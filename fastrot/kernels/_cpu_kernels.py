# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
"""The Numba kernel of the CPU implementation: panels in cache, vectors across lanes.

A *panel* is a small row-major matrix of float32 or float64 that stays in cache. :func:`sweep`
cuts a matrix into tiles and, for each, fills a panel (widening the storage dtype), transforms its
rows (right side) and its columns (left side), and writes it back with one rounding. Rows of whole
vectors that have no left side need no panel. Addresses, leading dimensions (``ld``) and steps are
in bytes; ``one`` is a number of the compute type.
"""

import numpy as np

from fastrot.kernels._cpu_blocks import COLUMNS, lanes_of, number, prefetch, take, word
from fastrot.kernels._cpu_compile import Kernel, part
from fastrot.kernels._cpu_parts import LINE_BYTES, columns, load, save
from fastrot.kernels._cpu_rows import narrow_rows, wide_row
from fastrot.kernels._cpu_vectors import FLOAT32, FLOAT64, VECTOR_BYTES

PLAN_WORDS = 20
"""Of a plan, before the bases of both sides."""
SHORT_BYTES, AHEAD = 1024, 8
"""Of tiles whose rows are as short, rows by which prefetching precedes the access."""


@part
def _right(source, before, target, after, scale, spot, side, left_size, place, work, one):
    """The right side of a tile, from memory into the panel, or to the end if there is no left."""
    src, src_kind, src_ld = source
    dst, dst_kind, dst_ld = target
    old, old_rows, recur = before
    new, new_rows, recur_after = after
    top, height, width = spot
    panel, ld, turned = place
    lanes = lanes_of(one)
    item, src_item, dst_item = VECTOR_BYTES // lanes, 8 >> min(src_kind, 2), 8 >> min(dst_kind, 2)
    own = FLOAT64 if item == 8 else FLOAT32
    wide = side[0] > 1 and side[1] >= lanes
    ones = work[1] + COLUMNS * VECTOR_BYTES
    for row in range(height):
        factor = number(old_rows, (top + row) % recur, one)
        at, here, there = src + row * src_ld, panel + row * ld, dst + row * dst_ld
        if not wide:
            load(at, src_kind, src_item, here, width, factor, old, ones, one)
        elif left_size > 1:
            wide_row(
                at, src_kind, src_item, old, here, own, item, 0, factor, side, width, turned, work,
                one,
            )  # fmt: skip
        else:
            factor *= scale * number(new_rows, (top + row) % recur_after, one)
            wide_row(
                at, src_kind, src_item, old, there, dst_kind, dst_item, new, factor, side, width,
                turned, work, one,
            )  # fmt: skip
    if not wide and side[0] > 1:
        narrow_rows(panel, height, ld, width, side, turned, work, one)
    for row in range(0 if wide or left_size > 1 else height):
        factor = scale * number(new_rows, (top + row) % recur_after, one)
        here, there = panel + row * ld, dst + row * dst_ld
        save(here, there, dst_kind, dst_item, width, factor, new, ones, one)


@part
def _left(source, before, target, after, scale, spot, side, right_size, place, work, one):
    """The left side of a tile, from memory, or from the panel if there is a right, to the end."""
    src, src_kind, src_ld = source
    dst, dst_kind, dst_ld = target
    old, old_rows, recur = before
    new, new_rows, recur_after = after
    top, height, width = spot
    panel, ld, _ = place
    size, bases, codes, strip = side
    lanes = lanes_of(one)
    item, src_item, dst_item = VECTOR_BYTES // lanes, 8 >> min(src_kind, 2), 8 >> min(dst_kind, 2)
    own, nothing = FLOAT64 if item == 8 else FLOAT32, (0, 0, 0, 0)
    ones = work[1] + COLUMNS * VECTOR_BYTES
    soon = AHEAD if width * item <= SHORT_BYTES else 0
    for start in range(0, width, strip):
        count = min(strip, width - start)
        here = panel + start * item
        between = (here, ld, own, 0)
        fetched = (src + start * src_item, src_ld, src_kind, soon)
        heavy = old + start * item if old else 0
        before_all = (heavy, 0, old_rows + top % recur * item if recur > 1 else 0, item)
        if right_size > 1:
            fetched, before_all = between, nothing
        elif count % lanes or bases[1]:
            for row in range(height):
                factor = number(old_rows, (top + row) % recur, one)
                at, to = fetched[0] + row * src_ld, here + row * ld
                for line in range(0, soon and count * src_item, LINE_BYTES):
                    prefetch(at + soon * src_ld + line, 0)
                load(at, src_kind, src_item, to, count, factor, heavy, ones, one)
            fetched, before_all = between, nothing
        light = new + start * item if new else 0
        after_all = (light, 0, new_rows + top % recur_after * item if recur_after > 1 else 0, item)
        there, by = (dst + start * dst_item, dst_ld, dst_kind, soon), scale
        apart = right_size > 1 or count % lanes > 0
        if apart:
            there, after_all, by = between, nothing, one
        columns(
            fetched, before_all, there, after_all, by, (here, ld), size,
            (count + lanes - 1) // lanes, bases, codes, work, one,
        )  # fmt: skip
        for row in range(height if apart else 0):
            factor = scale * number(new_rows, (top + row) % recur_after, one)
            at, to = here + row * ld, dst + start * dst_item + row * dst_ld
            for line in range(0, soon and count * dst_item, LINE_BYTES):
                prefetch(to + soon * dst_ld + line, 1)
            save(at, to, dst_kind, dst_item, count, factor, light, ones, one)


@part
def tiles(call, first, last, memory, one):
    """Tiles ``first`` to ``last - 1`` of a call, see :func:`sweep`."""
    src_at, src_kind, src_ld = word(call, 5), word(call, 6), word(call, 7)
    dst_at, dst_kind, dst_ld = word(call, 8), word(call, 9), word(call, 10)
    before_rows, before_cols = (word(call, 11), word(call, 12)), (word(call, 13), word(call, 14))
    after_rows, after_cols = (word(call, 15), word(call, 16)), (word(call, 17), word(call, 18))
    zeros, plan, scale = word(call, 19), word(call, 20), type(one)(number(call, 21, 1.0))
    rows, cols, tile_rows, tile_cols = word(plan, 0), word(plan, 1), word(plan, 2), word(plan, 3)
    lanes = lanes_of(one)
    item, src_item, dst_item = VECTOR_BYTES // lanes, 8 >> min(src_kind, 2), 8 >> min(dst_kind, 2)
    panel = (memory + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
    turned = panel + word(plan, 6)
    work = (turned + word(plan, 7), zeros)
    at_bases, count = plan + 8 * PLAN_WORDS, word(plan, 11)
    left = word(plan, 8), (at_bases, count, word(plan, 13)), word(plan, 12), word(plan, 4)
    size, power, tail, rest = word(plan, 14), word(plan, 15), word(plan, 16), word(plan, 17)
    right = size, power, tail, at_bases + 8 * count, rest, word(plan, 18), word(plan, 19)
    place = panel, word(plan, 5), turned
    across = (cols + tile_cols - 1) // tile_cols
    for tile in range(first, last):
        top, edge = tile // across * tile_rows, tile % across * tile_cols
        height, width = min(tile_rows, rows - top), min(tile_cols, cols - edge)
        old = before_cols[0] + edge % before_cols[1] * item if before_cols[0] else 0
        new = after_cols[0] + edge % after_cols[1] * item if after_cols[0] else 0
        source = src_at + top * src_ld + edge * src_item, src_kind, src_ld
        target = dst_at + top * dst_ld + edge * dst_item, dst_kind, dst_ld
        before, after = (old, before_rows[0], before_rows[1]), (new, after_rows[0], after_rows[1])
        spot = top, height, width
        if left[0] == 1 or size > 1:
            _right(source, before, target, after, scale, spot, right, left[0], place, work, one)
        if left[0] > 1:
            _left(source, before, target, after, scale, spot, left, size, place, work, one)


@part
def sweep(call, one):
    """The tiles of a call, ``dst = scale · A' Lᵀ (A src B) R B'``.

    Args:
        call: address of what ``cpu_sweep.CALL`` packs, words but for the last, a float64: memory,
            bytes of it for a thread, address of what threads share, number of tiles, tiles that a
            thread takes at a time; source and target as a ``cpu_sweep.Matrix``; addresses and
            lengths of the diagonals A, B, A' and B', which recur; constants; the plan; scale.
            Threads share two counters, of threads that found work and of tiles that were taken;
            null if there is one thread. B and B' are null for the identity. Constants are
            ``COLUMNS`` vectors of zeros, one of ones. A plan is the matrix's rows and columns and
            a tile's, the columns that the left side does at once, the panel's ld and bytes and
            those of ``turned``; of each side size, power, tail, number of bases, address of codes,
            and whether it is transposed; the bases of both.
        one: of the compute type.
    """
    memory, size, shared = word(call, 0), word(call, 1), word(call, 2)
    count, step = word(call, 3), word(call, 4)
    if shared == 0:
        tiles(call, 0, count, memory, one)
        return
    first = take(shared + 8, step)
    if first >= count:
        return
    memory += size * take(shared, 1)
    while first < count:
        tiles(call, first, min(first + step, count), memory, one)
        first = take(shared + 8, step)


@Kernel
def in_float32(call):
    """:func:`sweep` with float32 between."""
    sweep(call, np.float32(1))


@Kernel
def in_float64(call):
    """:func:`sweep` with float64 between."""
    sweep(call, np.float64(1))
