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
from fastrot.kernels._cpu_parts import (
    columns,
    load,
    narrow_rows,
    save,
    wide_row,
)
from fastrot.kernels._cpu_vectors import FLOAT32, FLOAT64, VECTOR_BYTES

LINE_BYTES = 64
PLAN_WORDS = 18
"""Of a plan, before the bases of both sides."""
AHEAD = 16
"""Rows by which prefetching precedes the access to a narrow tile."""


@part
def tiles(call, first, last, memory, one):
    """Tiles ``first`` to ``last - 1`` of a call, see :func:`sweep`."""
    src_at, src_kind, src_item, src_ld = word(call, 5), word(call, 6), word(call, 7), word(call, 8)
    dst_at, dst_kind, dst_item, dst_ld = (
        word(call, 9),
        word(call, 10),
        word(call, 11),
        word(call, 12),
    )
    before_rows = word(call, 13), word(call, 14)
    before_cols = word(call, 15), word(call, 16)
    after_rows = word(call, 17), word(call, 18)
    after_cols = word(call, 19), word(call, 20)
    zeros, plan = word(call, 21), word(call, 22)
    scale = type(one)(number(call, 23, 1.0))
    rows, cols, tile_rows, tile_cols = word(plan, 0), word(plan, 1), word(plan, 2), word(plan, 3)
    strip, ld = word(plan, 4), word(plan, 5)
    left_size = word(plan, 8)
    left_codes = word(plan, 12)
    bases = plan + 8 * PLAN_WORDS
    left_bases = bases, word(plan, 11)
    right = (
        word(plan, 13), word(plan, 14), word(plan, 15), bases + 8 * word(plan, 11), word(plan, 16),
        word(plan, 17),
    )  # fmt: skip
    lanes = lanes_of(one)
    item = VECTOR_BYTES // lanes
    ones = zeros + COLUMNS * VECTOR_BYTES
    panel = (memory + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
    turned = panel + word(plan, 6)
    work = (turned + word(plan, 7), zeros)
    across = (cols + tile_cols - 1) // tile_cols
    wide = right[0] > 1 and right[1] >= lanes
    direct = wide and right[4] == 0
    batch = 1 if wide else tile_rows
    reading = AHEAD * src_ld if left_size > 1 and tile_cols < cols else 0
    writing = AHEAD * dst_ld if reading else 0
    own = FLOAT64 if item == 8 else FLOAT32
    for tile in range(first, last):
        top, edge = tile // across * tile_rows, tile % across * tile_cols
        height, width = min(tile_rows, rows - top), min(tile_cols, cols - edge)
        weights, moving = ones, 0
        if before_cols[0]:
            weights, moving = before_cols[0] + edge % before_cols[1] * item, 1
        heavy = 0
        if after_cols[0]:
            heavy = after_cols[0] + edge % after_cols[1] * item
        for start in range(0, height, batch):
            for row in range(start, min(start + batch, height)):
                factor = number(before_rows[0], (top + row) % before_rows[1], one)
                at, here = src_at + (top + row) * src_ld + edge * src_item, panel + row * ld
                for line in range(0, reading and width * src_item, LINE_BYTES):
                    prefetch(at + reading + line, 0)
                kind, size, old = src_kind, src_item, weights * moving
                if not direct:
                    load(at, src_kind, src_item, here, width, factor, weights, moving, one)
                    at, kind, size, old, factor = here, own, item, 0, one
                if wide:
                    to, to_kind, to_item, new = here, own, item, 0
                    if left_size == 1:
                        to = dst_at + (top + row) * dst_ld + edge * dst_item
                        to_kind, to_item, new, factor = dst_kind, dst_item, heavy, factor * scale
                        factor *= number(after_rows[0], (top + row) % after_rows[1], one)
                    wide_row(
                        at, kind, size, old, to, to_kind, to_item, new, factor, right, width,
                        turned, work, one,
                    )  # fmt: skip
            if right[0] > 1 and not wide:
                here, rest = panel + start * ld, height - start
                narrow_rows(here, min(batch, rest), ld, width, right, turned, work, one)
        if wide and left_size == 1:
            continue
        weights, moving = ones, 0
        if heavy:
            weights, moving = heavy, 1
        for start in range(0, width, strip):
            count = min(strip, width - start)
            here = panel + start * item
            if left_size > 1:
                vectors = (count + lanes - 1) // lanes
                columns(here, left_size, ld, vectors, left_bases, left_codes, work, one)
            for row in range(height):
                factor = scale * number(after_rows[0], (top + row) % after_rows[1], one)
                at = dst_at + (top + row) * dst_ld + (edge + start) * dst_item
                for line in range(0, writing and count * dst_item, LINE_BYTES):
                    prefetch(at + writing + line, 1)
                here = panel + row * ld + start * item
                place = weights + moving * start * item
                save(here, at, dst_kind, dst_item, count, factor, place, moving, one)


@part
def sweep(call, one):
    """The tiles of a call, ``dst = scale · A' Lᵀ (A src B) R B'``.

    Args:
        call: address of what ``cpu.CALL`` packs, words but for the last, a float64: memory, bytes
            of it for a thread, address of what threads share, number of tiles, tiles that a thread
            takes at a time; source and target as a ``cpu.Matrix``; addresses and lengths of the
            diagonals A, B, A' and B', which recur; constants; the plan; scale. Threads share two
            counters, of threads and of tiles that were taken; null if there is one thread. B and B'
            are null for the identity. Constants are ``COLUMNS`` vectors of zeros, one of ones. A
            plan is the matrix's rows and columns and a tile's, the columns that the left side does
            at once, the panel's ld and bytes and those of ``turned``; of each side size, power,
            tail, number of bases and address of codes; the bases of both.
        one: of the compute type.
    """
    memory, size, shared = word(call, 0), word(call, 1), word(call, 2)
    count, step = word(call, 3), word(call, 4)
    if shared == 0:
        tiles(call, 0, count, memory, one)
        return
    memory += size * take(shared, 1)
    first = take(shared + 8, step)
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
