"""The CPU implementation of the operator: passes over tensors."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrot.hadamard import factors
from fastrot.kernels._cpu_memory import HUGE_BYTES, ask_for_huge_pages, require_writable
from fastrot.kernels.arguments import check_place, check_signs, check_sizes
from fastrot.kernels.cpu_sweep import (
    KINDS,
    STRIP_BYTES,
    Matrix,
    SweepPlan,
    as_array,
    compute_type,
    diagonal_of,
    plan_sweep,
    run,
)
from fastrot.kernels.weight import Workspace

LONG_PIECE = 64
"""Elements of a row, fewer of which in a panel are better read twice, and"""
LONG_BYTES = 1 << 22
"""the size of tensors for which that is so."""


def transform(x: Tensor, out: Tensor, signs: Tensor | None, scale: float, transpose: bool) -> None:
    """Write ``scale · (x D) H`` into ``out``, or ``scale · (x Hᵀ) D`` if ``transpose``.

    Args:
        x: ``(outer, n, inner)``, contiguous; float64, float32, bfloat16 or float16. Vectors lie
            along the middle dimension. Intermediates are float64 for float64, else float32.
        out: as ``x``, or ``x`` itself; rounded to nearest even once.
        signs: the diagonal of ``D``, ``(n,)`` of ±1, or None for the identity.
        scale: factor of the result.
        transpose: apply the transpose.
    """
    if x.numel():
        require_writable(out)
        write(x, out, x.shape[1], 1, signs, scale, transpose)


def transformed(
    x: Tensor, signs: Tensor | None, scale: float, size: int, dim: int, transpose: bool
) -> Tensor:
    """The whole operator for a contiguous tensor that is not empty.

    A decode step finds the caches full of weights, so what a call costs there is how much Python it
    touches: what depends on shapes alone is checked with the plan, once.
    """
    passes = _plan(x.shape, size, dim, transpose, x.dtype)
    if signs is not None:
        check_place(signs, size, x.device)
        check_signs(signs)
    out = torch.empty_like(x)
    plan, ld = passes[0][:2]
    if signs is not None or plan.tasks > plan.step or len(passes) > 1:
        write(x, out, size, dim, signs, scale, transpose)
        return out
    kind, nothing = KINDS[x.dtype], plan.nothing
    run(plan, (x.data_ptr(), kind, ld), (out.data_ptr(), kind, ld), nothing, nothing, scale)
    return out


def write(
    x: Tensor,
    out: Tensor,
    size: int,
    dim: int,
    signs: Tensor | None,
    scale: float,
    transpose: bool,
) -> None:
    """:func:`transform` of blocks of ``size`` along ``dim`` of contiguous tensors of any shape.

    ``out`` must be writable and not empty.
    """
    if out.nbytes >= HUGE_BYTES:
        ask_for_huge_pages(x, out)
    passes = _plan(x.shape, size, dim, transpose, x.dtype)
    kind, read = KINDS[x.dtype], x.data_ptr()
    # All memory is asked for before the first write: there may be none left after it.
    alone = len(passes) == 1
    workspace = None if alone else Workspace(0, max(each.plan.memory for each in passes))
    for index, (plan, ld, columns, weighed) in enumerate(passes, 1):
        source, target = (read, kind, ld), (out.data_ptr(), kind, ld)
        weights, factor = signs if weighed else None, scale if index == len(passes) else 1.0
        _sweep(plan, source, target, weights, x.dtype, size, columns, transpose, factor, workspace)
        read = out.data_ptr()


def beside(
    a: Tensor, b: Tensor, signs: Tensor | None, scale: float, size: int, transpose: bool
) -> Tensor:
    """:func:`transformed` of the rows of ``torch.cat((a, b), 1)``, which is not made.

    Args:
        a: ``(rows, width)`` with unit stride along rows, not empty.
        b: as ``a``, of any width. Where both are slices of one matrix, they are read as one.
        signs: as for the operator.
        scale: of the result.
        size: of the blocks.
        transpose: as for the operator.
    """
    rows, width = a.shape
    whole = width + b.shape[1]
    for part in (a, b):
        check_sizes(part.shape, part.dtype, size, 1)
    if signs is not None:
        check_place(signs, size, a.device)
        check_signs(signs)
    out = a.new_empty((rows, whole))
    kind, item = KINDS[a.dtype], a.itemsize
    at, here, ld = a.data_ptr(), out.data_ptr(), whole * item
    end, steps = width * item, a.stride()
    parts = [(at, here, steps[0], whole)]
    if b.data_ptr() != at + end or b.stride() != steps:
        parts = [
            (at, here, steps[0], width),
            (b.data_ptr(), here + end, b.stride(0), whole - width),
        ]
    for read, written, step, cols in parts:
        source, target = (read, kind, step * item), (written, kind, ld)
        plan = _plan_rows(rows, cols, size, transpose, a.dtype)
        _sweep(plan, source, target, signs, a.dtype, size, False, transpose, scale)
    return out


def _sweep(
    plan: SweepPlan,
    source: Matrix,
    target: Matrix,
    signs: Tensor | None,
    dtype: torch.dtype,
    size: int,
    columns: bool,
    transpose: bool,
    scale: float,
    workspace: Workspace | None = None,
) -> None:
    before = after = plan.nothing
    if signs is not None:
        weights = as_array(signs, compute_type(dtype))
        if not columns and plan.width != size:
            weights = np.tile(weights, plan.width // size)
        diagonal = diagonal_of(weights)
        diagonals = (*diagonal, *after[2:]) if columns else (*after[:2], *diagonal)
        before, after = (before, diagonals) if transpose else (diagonals, after)
    run(plan, source, target, before, after, scale, workspace)


@lru_cache
def _plan_rows(rows: int, cols: int, n: int, transpose: bool, dtype: torch.dtype) -> SweepPlan:
    """Of blocks of ``n`` along rows that need not follow each other."""
    check_sizes(torch.Size((rows, cols)), dtype, n, 1)
    sides = (1, False), (n, transpose)
    return plan_sweep((rows, cols), *sides, dtype.itemsize, compute_type(dtype))


class _Pass(NamedTuple):
    """Over a tensor: its plan, bytes from row to row; whether it is of columns, and has signs."""

    plan: SweepPlan
    ld: int
    columns: bool = True
    weighed: bool = True


@lru_cache
def _plan(
    shape: torch.Size, n: int, dim: int, transpose: bool, dtype: torch.dtype
) -> tuple[_Pass, ...]:
    """One pass over a tensor; two, each of some factors, along a long first dimension.

    Of long columns the panel holds short pieces of many rows, which memory is slow to give. Two
    passes read more, but wider. What is between is rounded to ``dtype``, so that it must be the
    type in which the kernel computes.
    """
    check_sizes(shape, dtype, n, dim)
    item, inner = dtype.itemsize, math.prod(shape[dim + 1 :])
    outer = shape.numel() // (n * inner)
    compute = compute_type(dtype)
    if inner == 1:
        plan = plan_sweep((1, outer * n), (1, False), (n, transpose), item, compute)
        return (_Pass(plan, outer * n * item, columns=False),)
    rows, cols = outer * n, inner
    near = _near(n, item) if dtype == compute and inner * n * item > LONG_BYTES else 1
    plan = plan_sweep(
        (rows, cols), (n if near == 1 else near, transpose), (1, False), item, compute
    )
    whole = _Pass(plan, cols * item)
    if near == 1:
        return (whole,)
    rows, cols = rows // near, cols * near
    plan = plan_sweep((rows, cols), (n // near, transpose), (1, False), item, compute)
    far = _Pass(plan, cols * item, weighed=False)
    return (far, whole) if transpose else (whole, far)


def _near(n: int, item: int) -> int:
    """The power of two that the first of two passes transforms; 1 if one pass does it all."""
    if n * item * LONG_PIECE <= STRIP_BYTES:
        return 1
    bases, power = factors(n)
    near = 1
    while near * near < n and 2 * near <= power:
        near *= 2
    return near if factors(n // near) == (bases, power // near) else 1
