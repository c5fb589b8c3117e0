"""The CPU implementation: tiles, threads and buffers around the numba kernels."""

import math
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrot.hadamard import base_matrix, factors
from fastrot.kernels import _cpu_blocks as blocks
from fastrot.kernels import _cpu_kernels as kernels
from fastrot.kernels import _cpu_vectors as vectors
from fastrot.kernels._cpu_memory import HUGE_BYTES, ask_for_huge_pages, require_writable
from fastrot.kernels._cpu_threads import on_threads
from fastrot.kernels.arguments import check_place, check_signs, check_sizes
from fastrot.kernels.weight import Workspace

ROW_BYTES = 1 << 14
"""Short rows are taken together up to this size: the panel stays in the first-level cache."""
PANEL_BYTES = 1 << 19
"""A panel of columns stays in the second level."""
STRIP_BYTES = 1 << 21
"""A panel of whole columns is in the third level: long pieces of rows matter more."""
LONG_PIECE = 64
"""Elements of a row, fewer of which in a panel are better read twice, and"""
LONG_BYTES = 1 << 22
"""the size of tensors for which that is so."""
TASK_ELEMENTS = 1 << 17
"""Work that a thread takes at a time; what is not more runs without threads."""
CALL = Struct("=21qd")
"""What a kernel is told, see ``_cpu_kernels.sweep``."""

KINDS = {
    torch.float64: vectors.FLOAT64,
    torch.float32: vectors.FLOAT32,
    torch.bfloat16: vectors.BFLOAT16,
    torch.float16: vectors.FLOAT16,
}

Matrix = tuple[int, int, int]
"""Address, kind, bytes from row to row."""


Diagonals = tuple[int, int, int, int]
"""Addresses and lengths of those of rows and columns."""


class SweepPlan(NamedTuple):
    """How a matrix is cut.

    Attributes:
        kernel: for the compute type.
        words: what ``kernels.sweep`` takes as its plan.
        codes: whose addresses are among the words.
        constants: of the compute type, see :func:`constants_of`.
        nothing: the identity as a pair of diagonals.
        places: addresses of constants and words.
        width: columns of a tile.
        memory: bytes that a thread needs.
        tasks: number of tiles.
        step: tiles that a thread takes at a time.
    """

    kernel: Any
    words: NDArray[np.int64]
    codes: tuple[NDArray[np.uint16], ...]
    constants: NDArray[Any]
    nothing: Diagonals
    places: tuple[int, int]
    width: int
    memory: int
    tasks: int
    step: int


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
    _run_here(plan, (x.data_ptr(), kind, ld), (out.data_ptr(), kind, ld), nothing, nothing, scale)
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
    for index, (plan, ld, columns, weighed) in enumerate(passes, 1):
        source, target = (read, kind, ld), (out.data_ptr(), kind, ld)
        weights, factor = signs if weighed else None, scale if index == len(passes) else 1.0
        _sweep(plan, source, target, weights, x.dtype, size, columns, transpose, factor)
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
) -> None:
    before = after = plan.nothing
    if signs is not None:
        weights = as_array(signs, torch.float64 if dtype == torch.float64 else torch.float32)
        if not columns and plan.width != size:
            weights = np.tile(weights, plan.width // size)
        diagonal = diagonal_of(weights)
        diagonals = (*diagonal, *after[2:]) if columns else (*after[:2], *diagonal)
        before, after = (before, diagonals) if transpose else (diagonals, after)
    if plan.tasks > plan.step:
        run(plan, source, target, before, after, scale)
    else:
        _run_here(plan, source, target, before, after, scale)


@lru_cache
def _plan_rows(rows: int, cols: int, n: int, transpose: bool, dtype: torch.dtype) -> SweepPlan:
    """Of blocks of ``n`` along rows that need not follow each other."""
    check_sizes(torch.Size((rows, cols)), dtype, n, 1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return plan_sweep((rows, cols), (1, False), (n, transpose), dtype.itemsize, compute)


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
    compute = torch.float64 if dtype == torch.float64 else torch.float32
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


def as_array(vector: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """A diagonal as the kernels take it."""
    array: NDArray[Any]
    if vector.dtype == torch.int8:  # the usual signs, for which torch takes thrice the time
        array = vector.numpy().astype(constants_of(dtype).dtype)
        return array
    array = vector.detach().to(dtype).contiguous().numpy()
    return array


def address_of(array: NDArray[Any]) -> int:
    """Of its first number."""
    address: int = array.__array_interface__["data"][0]
    return address


def diagonal_of(weights: NDArray[Any]) -> tuple[int, int]:
    """Address and length of a diagonal, which the caller keeps."""
    return address_of(weights), weights.size


@lru_cache
def no_diagonals(dtype: torch.dtype) -> Diagonals:
    """The identity as a pair of diagonals: a one that recurs for rows, null for columns."""
    constants = constants_of(dtype)
    return address_of(constants) + constants.nbytes - dtype.itemsize, 1, 0, 1


@lru_cache
def constants_of(dtype: torch.dtype) -> NDArray[Any]:
    """``COLUMNS`` vectors of zeros and one of ones."""
    lanes = vectors.VECTOR_BYTES // dtype.itemsize
    constants = torch.zeros((blocks.COLUMNS + 1) * lanes, dtype=dtype).numpy()
    constants[-lanes:] = 1
    return constants


class _Side(NamedTuple):
    """A Hadamard matrix for the kernels: its factors, and the codes of their signed sums.

    ``tail`` is the order of those that act on turned blocks, see ``_cpu_parts.narrow_rows``.
    """

    size: int
    power: int
    tail: int
    bases: tuple[int, ...]
    codes: NDArray[np.uint16]

    def words(self) -> tuple[int, ...]:
        return self.size, self.power, self.tail, len(self.bases), self.codes.ctypes.data


@lru_cache
def _side(size: int, transpose: bool, lanes: int) -> _Side:
    bases, power = factors(size)
    codes = [np.empty(0, np.uint16), *(_codes(m, transpose) for m in bases)]
    tail = size
    for m in bases:
        if tail // m % lanes:
            break
        tail //= m
    return _Side(size, power, tail, bases, np.concatenate(codes))


def _codes(m: int, transpose: bool) -> NDArray[np.uint16]:
    """Which entry of the tables is each signed sum of four: (m outputs, m / 4 groups)."""
    matrix = base_matrix(m) if transpose else base_matrix(m).T
    signs = (matrix.reshape(m, m // 4, 4) < 0) @ np.array([1, 2, 4, 8])
    table = np.arange(m // 4) % blocks.TABLES
    step = blocks.COLUMNS * vectors.VECTOR_BYTES // blocks.UNIT
    codes: NDArray[np.uint16] = ((table * 16 + signs) * step).astype(np.uint16).ravel()
    return codes


@lru_cache
def plan_sweep(
    shape: tuple[int, int],
    left: tuple[int, bool],
    right: tuple[int, bool],
    storage: int,
    dtype: torch.dtype,
) -> SweepPlan:
    """Cut a matrix, ``storage`` bytes an element, into tiles of whole blocks of both sides."""
    rows, cols = shape
    item, vector = dtype.itemsize, vectors.VECTOR_BYTES
    lanes = vector // item
    sides = _side(*left, lanes), _side(*right, lanes)
    size = sides[1].size
    narrow = size > 1 and sides[1].power < lanes
    strip = 1 << 20
    if left[0] > 1:
        line = max(kernels.LINE_BYTES // storage, lanes)
        wanted = line * max(1, PANEL_BYTES // (left[0] * item * line))
        if size == 1:
            strip = line * max(1, STRIP_BYTES // (left[0] * item * line))
            wanted = strip * max(1, TASK_ELEMENTS // (left[0] * strip))
        tile = left[0], min(cols, -(-wanted // size) * size)
    else:
        wanted = blocks.COLUMNS * lanes if narrow else max(1, ROW_BYTES // (item * size))
        width = min(cols, wanted * size)
        tile = min(rows, max(1, wanted * size // width)), width
    if left[0] > 1 and size > 1:
        strip = max(4, PANEL_BYTES // 16 // (left[0] * vector)) * lanes
    ld = (
        -(-(min(strip, tile[1]) if left[0] > 1 and size == 1 else tile[1]) * item // vector)
        * vector
    )
    if tile[0] > 1 and ld % (4 * vector) == 0:
        ld += vector  # rows a power of two apart would share few sets of the cache
    turned = (
        sides[1].tail * blocks.COLUMNS * vector if narrow else -(-size * item // vector) * vector
    )
    bases = sides[0].bases + sides[1].bases
    work = (blocks.TABLES * 16 + max(bases, default=0)) * blocks.COLUMNS * vector
    panel = ld, tile[0] * ld, turned
    words = *shape, *tile, strip, *panel, *sides[0].words(), *sides[1].words(), *bases
    tasks = -(-rows // tile[0]) * -(-cols // tile[1])
    constants, table = constants_of(dtype), np.array(words, np.int64)
    return SweepPlan(
        kernel=kernels.in_float64 if dtype == torch.float64 else kernels.in_float32,
        words=table,
        codes=tuple(side.codes for side in sides),
        constants=constants,
        places=(address_of(constants), address_of(table)),
        nothing=no_diagonals(dtype),
        width=tile[1],
        memory=vector + panel[1] + turned + work,
        tasks=tasks,
        step=max(1, TASK_ELEMENTS // (tile[0] * tile[1])),
    )


def run(
    plan: SweepPlan,
    source: Matrix,
    target: Matrix,
    before: Diagonals,
    after: Diagonals,
    scale: float,
    workspace: Workspace | None = None,
) -> None:
    """Sweep all tiles, on the threads torch would use or those that a workspace is for.

    Args:
        plan: how the matrix is cut.
        source: what is read.
        target: what is written.
        before: the diagonals of rows and columns before the transforms.
        after: those behind them.
        scale: factor of the result.
        workspace: with ``plan.memory`` bytes or more for each thread; default, made here.
    """
    threads = workspace.threads if workspace else torch.get_num_threads()
    threads = min(threads, -(-plan.tasks // plan.step))
    panels = workspace.panels if workspace else np.empty(threads * plan.memory, np.uint8)
    shared = np.zeros(2, np.int64)
    ways = address_of(panels), plan.memory, address_of(shared), plan.tasks, plan.step
    call = CALL.pack(*ways, *source, *target, *before, *after, *plan.places, scale)
    on_threads(plan.kernel, call, threads)


def _run_here(
    plan: SweepPlan,
    source: Matrix,
    target: Matrix,
    before: Diagonals,
    after: Diagonals,
    scale: float,
) -> None:
    """:func:`run` on this thread."""
    memory = np.empty(plan.memory, np.uint8)
    ways = address_of(memory), plan.memory, 0, plan.tasks, plan.step
    plan.kernel(CALL.pack(*ways, *source, *target, *before, *after, *plan.places, scale))
