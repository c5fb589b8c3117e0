# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, D417
"""The Numba kernel of the CPU implementation: panels in cache, vectors across lanes.

A *panel* is a small row-major matrix of float32 or float64 that stays in cache. :func:`sweep`
cuts a matrix into tiles and, for each, fills a panel (widening the storage dtype), transforms its
rows (right side) and its columns (left side), and writes it back with one rounding. Rows of whole
vectors that have no left side need no panel. Addresses, leading dimensions (``ld``) and steps are
in bytes; ``one`` is a number of the compute type.
"""

from fastrot.kernels._cpu_blocks import COLUMNS, address_of, lanes_of, prefetch
from fastrot.kernels._cpu_compile import kernel
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
    wide = right[0] > 1 and right[1] >= lanes
    direct = wide and right[3].size == 0
    batch = 1 if wide else tile_rows
    reading = AHEAD * src_ld if left_size > 1 and tile_cols < cols else 0
    writing = AHEAD * dst_ld if reading else 0
    own = FLOAT64 if item == 8 else FLOAT32
    for tile in range(first, last):
        top, edge = tile // across * tile_rows, tile % across * tile_cols
        height, width = min(tile_rows, rows - top), min(tile_cols, cols - edge)
        weights, moving = ones, 0
        if before_cols.size:
            weights, moving = address_of(before_cols) + edge % before_cols.size * item, 1
        heavy = 0
        if after_cols.size:
            heavy = address_of(after_cols) + edge % after_cols.size * item
        for start in range(0, height, batch):
            for row in range(start, min(start + batch, height)):
                factor = before_rows[(top + row) % before_rows.size] if before_rows.size else one
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
                        if after_rows.size:
                            factor *= after_rows[(top + row) % after_rows.size]
                    wide_row(
                        at, kind, size, old, to, to_kind, to_item, new, factor, right, width,
                        turned, work, one,
                    )  # fmt: skip
            if right[0] > 1 and not wide:
                here, rest = panel + start * ld, height - start
                narrow_rows(here, min(batch, rest), ld, width, right, turned, work, one)
        if wide and left_size == 1:
            continue
        factor, weights, moving = scale, ones, 0
        if heavy:
            weights, moving = heavy, 1
        for start in range(0, width, strip):
            count = min(strip, width - start)
            here = panel + start * item
            if left_size > 1:
                vectors = (count + lanes - 1) // lanes
                columns(here, left_size, ld, vectors, left_bases, left_codes, work, one)
            for row in range(height):
                if after_rows.size:
                    factor = scale * after_rows[(top + row) % after_rows.size]
                at = dst_at + (top + row) * dst_ld + (edge + start) * dst_item
                for line in range(0, writing and count * dst_item, LINE_BYTES):
                    prefetch(at + writing + line, 1)
                here = panel + row * ld + start * item
                place = weights + moving * start * item
                save(here, at, dst_kind, dst_item, count, factor, place, moving, one)
