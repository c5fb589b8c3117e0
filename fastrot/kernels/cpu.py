"""The CPU implementation: tiles, threads and buffers around the numba kernels."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrot.hadamard import base_matrix, factors
from fastrot.kernels import _cpu_blocks as blocks
from fastrot.kernels import _cpu_kernels as kernels
from fastrot.kernels import _cpu_vectors as vectors

ROW_BYTES = 1 << 14
"""Short rows are taken together up to this size: the panel stays in the first-level cache."""
PANEL_BYTES = 1 << 19
"""A panel of columns stays in the second level."""
TILE_BYTES = 1 << 22
"""The largest panel for two sides at once; beyond, a scratch matrix takes the intermediate."""
TASK_ELEMENTS = 1 << 17
"""Work that a thread takes at a time; what is not more runs without threads."""

_KINDS = {
    torch.float64: (vectors.FLOAT64, 8),
    torch.float32: (vectors.FLOAT32, 4),
    torch.bfloat16: (vectors.BFLOAT16, 2),
    torch.float16: (vectors.FLOAT16, 2),
}

Matrix = tuple[int, int, int, int]
"""Address, kind, bytes of an element, bytes from row to row."""


class Side(NamedTuple):
    """Orthonormal transforms of blocks of ``size`` along one dimension of a weight."""

    size: int
    signs: Tensor | None = None
    transpose: bool = False


class _Plan(NamedTuple):
    """How a matrix is cut; the arguments of ``kernels.sweep`` are those of ``arguments``."""

    arguments: tuple[Any, ...]
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
    outer, n, inner = x.shape
    if x.numel() == 0:
        return
    kind, item = _KINDS[x.dtype]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if inner == 1:
        plan = _plan((1, outer * n), (1, False), (n, transpose), item, compute)
    else:
        plan = _plan((outer * n, inner), (n, transpose), (1, False), item, compute)
    before = after = none = _none(compute)
    if signs is not None:
        weights = _array(signs, compute)
        if inner == 1:
            diagonals = none[0], np.tile(weights, plan.arguments[1][1] // n)
        else:
            diagonals = weights, none[0]
        before, after = (none, diagonals) if transpose else (diagonals, none)
    ld = plan.arguments[0][1] * item
    source, target = (x.data_ptr(), kind, item, ld), (out.data_ptr(), kind, item, ld)
    _run(plan, source, target, before, after, scale, compute)


def rotate_matrix(
    w: Tensor,
    out: Tensor,
    *,
    left: Side | None,
    right: Side | None,
    gamma: Tensor | None,
    row_gamma: Tensor | None = None,
    dtype: torch.dtype,
) -> None:
    """Rotate a weight with one rounding: ``out = Lᵀ (diag(row_gamma) w diag(gamma)) R``.

    R transforms every block of ``right.size`` columns of each row and L every block of
    ``left.size`` rows of each column, as :func:`transform` does with ``scale = size ** -0.5``.
    Beyond panels in cache this takes memory only where both sides are wide: one matrix like
    ``w`` in ``dtype``.

    Args:
        w: ``(rows, cols)``, a floating dtype, unit column stride, any row stride.
        out: as ``w`` but for the dtype, or ``w`` itself.
        left: the side along the columns, or None for the identity.
        right: the side along the rows, likewise.
        gamma: ``(cols,)``, or None.
        row_gamma: ``(rows,)``, or None.
        dtype: float64 or float32, of every intermediate.
    """
    if w.numel() == 0:
        return
    rows, cols = w.shape
    item = max(w.element_size(), out.element_size())
    none = _none(dtype)[0]
    nothing = 1, False
    on_left = (left.size, left.transpose) if left else nothing
    on_right = (right.size, right.transpose) if right else nothing
    before = (
        _weights(row_gamma, left, False, rows, dtype),
        _weights(gamma, right, False, cols, dtype),
    )
    after = _weights(None, left, True, rows, dtype), _weights(None, right, True, cols, dtype)
    scale = float(on_left[0] * on_right[0]) ** -0.5
    if left and right and left.size * right.size * dtype.itemsize > TILE_BYTES:
        # NumPy asks for huge pages: touching fresh memory costs more than the transform.
        scratch = torch.from_numpy(np.empty(w.shape, none.dtype))
        first = _plan((rows, cols), nothing, on_right, item, dtype)
        second = _plan((rows, cols), on_left, nothing, dtype.itemsize, dtype)
        middle = _matrix(scratch)
        _run(first, _matrix(w), middle, before, (none, none), 1.0, dtype)
        _run(second, middle, _matrix(out), (none, none), after, scale, dtype)
    else:
        plan = _plan((rows, cols), on_left, on_right, item, dtype)
        _run(plan, _matrix(w), _matrix(out), before, after, scale, dtype)


def _weights(
    gamma: Tensor | None, side: Side | None, transpose: bool, length: int, dtype: torch.dtype
) -> NDArray[Any]:
    """The diagonal along one dimension: gamma, times the signs if they stand on this end."""
    weights = _none(dtype)[0] if gamma is None else _array(gamma, dtype)
    if side is None or side.signs is None or side.transpose != transpose:
        return weights
    signs = np.tile(_array(side.signs, dtype), length // side.size)
    return weights * signs if weights.size else signs


def _array(vector: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    array: NDArray[Any] = vector.detach().to(dtype).contiguous().numpy()
    return array


def _matrix(w: Tensor) -> Matrix:
    kind, item = _KINDS[w.dtype]
    return w.data_ptr(), kind, item, w.stride(0) * item


@lru_cache
def _none(dtype: torch.dtype) -> tuple[NDArray[Any], NDArray[Any]]:
    """The identity as a pair of diagonals."""
    empty = torch.empty(0, dtype=dtype).numpy()
    return empty, empty


@lru_cache
def _constants(dtype: torch.dtype) -> NDArray[Any]:
    """``COLUMNS`` vectors of zeros and one of ones."""
    lanes = vectors.VECTOR_BYTES // dtype.itemsize
    constants = torch.zeros((blocks.COLUMNS + 1) * lanes, dtype=dtype).numpy()
    constants[-lanes:] = 1
    return constants


@lru_cache
def _side(size: int, transpose: bool) -> tuple[int, int, NDArray[np.int64], NDArray[np.uint8]]:
    """A Hadamard matrix for the kernels: size, power, bases, codes of their signed sums."""
    bases, power = factors(size)
    codes = [np.empty(0, np.uint8), *(_codes(m, transpose) for m in bases)]
    return size, power, np.array(bases, np.int64), np.concatenate(codes)


def _codes(m: int, transpose: bool) -> NDArray[np.uint8]:
    """Which entry of the tables is each signed sum of four: (m outputs, m / 4 groups)."""
    matrix = base_matrix(m) if transpose else base_matrix(m).T
    signs = (matrix.reshape(m, m // 4, 4) < 0) @ np.array([1, 2, 4, 8])
    table = np.arange(m // 4) % blocks.TABLES
    codes: NDArray[np.uint8] = (table * 16 + signs).astype(np.uint8).ravel()
    return codes


@lru_cache
def _plan(
    shape: tuple[int, int],
    left: tuple[int, bool],
    right: tuple[int, bool],
    storage: int,
    dtype: torch.dtype,
) -> _Plan:
    """Cut a matrix, ``storage`` bytes an element, into tiles of whole blocks of both sides."""
    rows, cols = shape
    item, vector = dtype.itemsize, vectors.VECTOR_BYTES
    lanes = vector // item
    size, power = right[0], _side(*right)[1]
    narrow = size > 1 and power < lanes
    if left[0] > 1:
        line = max(kernels.LINE_BYTES // storage, lanes)
        wanted = line * max(1, PANEL_BYTES // (left[0] * item * line))
        tile = left[0], min(cols, -(-wanted // size) * size)
    else:
        wanted = blocks.COLUMNS * lanes if narrow else max(1, ROW_BYTES // (item * size))
        width = min(cols, wanted * size)
        tile = min(rows, max(1, wanted * size // width)), width
    strip = tile[1]
    if left[0] > 1 and size > 1:
        strip = max(4, PANEL_BYTES // 16 // (left[0] * vector)) * lanes
    ld = -(-tile[1] * item // vector) * vector
    if tile[0] > 1 and ld % (4 * vector) == 0:
        ld += vector  # rows a power of two apart would share few sets of the cache
    turned = size * blocks.COLUMNS * vector if narrow else 0
    sides = _side(*left), _side(*right)
    largest = max([0, *sides[0][2], *sides[1][2]])
    work = (blocks.TABLES * 16 + int(largest)) * blocks.COLUMNS * vector
    panel = ld, tile[0] * ld, turned
    tasks = -(-rows // tile[0]) * -(-cols // tile[1])
    return _Plan(
        arguments=(shape, tile, strip, *sides, panel),
        memory=vector + panel[1] + turned + work,
        tasks=tasks,
        step=max(1, TASK_ELEMENTS // (tile[0] * tile[1])),
    )


def _run(
    plan: _Plan,
    source: Matrix,
    target: Matrix,
    before: tuple[NDArray[Any], NDArray[Any]],
    after: tuple[NDArray[Any], NDArray[Any]],
    scale: float,
    dtype: torch.dtype,
) -> None:
    """Sweep all tiles, on the threads torch would use."""
    constants = _constants(dtype)
    factor = constants.dtype.type(scale)
    starts = iter(range(0, plan.tasks, plan.step))

    def work() -> None:
        memory = np.empty(plan.memory, np.uint8)
        for first in starts:
            last = min(first + plan.step, plan.tasks)
            kernels.sweep(
                first,
                last,
                source,
                target,
                plan.arguments,
                before,
                after,
                memory,
                constants,
                factor,
            )

    _on_threads(work, -(-plan.tasks // plan.step))


def _on_threads(work: Callable[[], None], most: int) -> None:
    others = min(torch.get_num_threads(), most) - 1
    if others < 1:
        work()
        return
    with ThreadPoolExecutor(others) as pool:
        futures = [pool.submit(work) for _ in range(others)]
        work()
        for future in futures:
            future.result()
