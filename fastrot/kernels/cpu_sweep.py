"""Sweeps of the CPU kernels over a matrix: how it is cut, threads and buffers."""

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
from fastrot.kernels._cpu_parts import LINE_BYTES
from fastrot.kernels._cpu_threads import on_threads
from fastrot.kernels.weight import Workspace

ROW_BYTES = 1 << 14
"""Short rows are taken together up to this size: the panel stays in the first-level cache."""
PANEL_BYTES = 1 << 19
"""A panel of columns stays in the second level."""
STRIP_BYTES = 1 << 21
"""A panel of whole columns is in the third level: long pieces of rows matter more."""
TASK_ELEMENTS = 1 << 17
"""Work that a thread takes at a time; what is not more runs without threads."""
TILES = 16
"""Of columns, at least so many, if their rows are of four lines or more: threads share them."""
SPARE_BYTES = 1 << 17
"""No more memory is kept for the next call of the same kind."""
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
        spare: memory that may be used again, at most one.
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
    spare: list[tuple[NDArray[np.uint8], int]]


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """Of what lies between, for tensors of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    constants = np.zeros((blocks.COLUMNS + 1) * lanes, f"f{dtype.itemsize}")
    constants[-lanes:] = 1
    return constants


class _Side(NamedTuple):
    """A Hadamard matrix for the kernels: its factors, and the codes of their signed sums.

    ``tail`` is the order of those that act on turned blocks, see ``_cpu_rows.narrow_rows``.
    """

    size: int
    power: int
    tail: int
    bases: tuple[int, ...]
    codes: NDArray[np.uint16]
    transposed: bool

    def words(self) -> tuple[int, ...]:
        """Of a plan."""
        codes = address_of(self.codes)
        return self.size, self.power, self.tail, len(self.bases), codes, self.transposed


@lru_cache
def _side(size: int, transpose: bool, lanes: int) -> _Side:
    bases, power = factors(size)
    codes = [np.empty(0, np.uint16), *(_codes(m, transpose) for m in bases)]
    tail = size
    for m in bases:
        if tail // m % lanes:
            break
        tail //= m
    return _Side(size, power, tail, bases, np.concatenate(codes), transpose)


def _codes(m: int, transpose: bool) -> NDArray[np.uint16]:
    """Which entry of the tables is each signed sum of four: (m outputs, m / 4 groups)."""
    matrix = base_matrix(m) if transpose else base_matrix(m).T
    signs = (matrix.reshape(m, m // 4, 4) < 0) @ np.array([1, 2, 4, 8])
    table = np.arange(m // 4) % blocks.TABLES
    step = blocks.COLUMNS * vectors.VECTOR_BYTES // blocks.CODE_UNIT
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
    if left[0] > 1:
        line = max(LINE_BYTES // storage, lanes)
        lines = max(1, (STRIP_BYTES if size == 1 else PANEL_BYTES) // (left[0] * item * line))
        fair = cols * rows // left[0] // (line * TILES)
        wanted = line * min(lines, max(4, fair))
        tile = left[0], min(cols, -(-wanted // size) * size)
    else:
        wanted = blocks.COLUMNS * lanes if narrow else max(1, ROW_BYTES // (item * size))
        width = min(cols, wanted * size)
        tile = min(rows, max(1, wanted * size // width)), width
    strip = tile[1] if size == 1 else max(4, PANEL_BYTES // 16 // (left[0] * vector)) * lanes
    ld = -(-tile[1] * item // vector) * vector
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
        spare=[],
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

    Few tiles are swept here, in the memory of the last such call if no other thread has it.

    Args:
        plan: how the matrix is cut.
        source: what is read.
        target: what is written.
        before: the diagonals of rows and columns before the transforms.
        after: those behind them.
        scale: factor of the result.
        workspace: with ``plan.memory`` bytes or more for each thread; default, made here.
    """
    rest = plan.tasks, plan.step, *source, *target, *before, *after, *plan.places, scale
    if workspace is None and plan.tasks <= plan.step:
        try:
            memory, address = plan.spare.pop()
        except IndexError:
            memory = np.empty(plan.memory, np.uint8)
            address = address_of(memory)  # which takes NumPy as long as a short row
        plan.kernel(CALL.pack(address, plan.memory, 0, *rest))
        if not plan.spare and plan.memory <= SPARE_BYTES:
            plan.spare.append((memory, address))
        return
    team = workspace.threads if workspace else torch.get_num_threads()
    threads = min(team, -(-plan.tasks // plan.step))
    panels = workspace.panels if workspace else np.empty(threads * plan.memory, np.uint8)
    shared = np.zeros(2, np.int64)
    call = CALL.pack(address_of(panels), plan.memory, address_of(shared), *rest)
    on_threads(plan.kernel, call, threads, team)
