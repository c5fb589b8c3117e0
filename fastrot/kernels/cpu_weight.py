"""Both sides of a weight on the CPU: prepared first, then run without asking for anything."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrot.kernels._cpu_memory import prepare_output
from fastrot.kernels.cpu_sweep import (
    KINDS,
    Diagonals,
    Matrix,
    SweepPlan,
    as_array,
    diagonal_of,
    plan_sweep,
    run,
)
from fastrot.kernels.weight import Side, TwoSided, Workspace

TILE_BYTES = 1 << 22
"""The largest panel for two sides at once; beyond, a scratch matrix takes the intermediate."""

Pair = tuple[NDArray[Any] | None, NDArray[Any] | None]
"""Diagonals of rows and columns; None is the identity."""


class _Sweep(NamedTuple):
    """One pass over a matrix, with everything but addresses."""

    plan: SweepPlan
    before: Pair
    after: Pair
    scale: float


class MatrixRotation:
    """Stages one after the other, for matrices of one shape and layout, with one rounding.

    Args:
        like: ``(rows, cols)``, a floating dtype, unit column stride, any row stride.
        out: the layout of the result, likewise; the dtype may be another.
        stages: what to do.
        dtype: float64 or float32, of every intermediate.

    Attributes:
        scratch: bytes that a run needs for its intermediate: the matrix in ``dtype`` where both
            sides of a stage are wide or there are several stages, else 0.
        panel: bytes that each of its threads needs.
        kind: equal where the same kernels run.

    Raises:
        ValueError: ``out`` lies in memory that may be read but not written.
    """

    def __init__(self, like: Tensor, out: Tensor, stages: Sequence[TwoSided], dtype: torch.dtype):
        self.shape, self.dtype = (int(like.shape[0]), int(like.shape[1])), dtype
        self.kind = dtype
        item = max(like.element_size(), out.element_size())
        if like.numel():
            prepare_output(like, out)
        self._sweeps: list[_Sweep] = []
        for stage in stages if like.numel() else ():
            alone = len(stages) == 1
            self._sweeps += _sweeps(stage, self.shape, item if alone else dtype.itemsize, dtype)
        self.scratch = like.numel() * dtype.itemsize if len(self._sweeps) > 1 else 0
        self.panel = max((sweep.plan.memory for sweep in self._sweeps), default=0)

    def run(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Write the stages of ``source`` into ``target``, which may be the same memory."""
        ld = self.shape[1] * self.dtype.itemsize
        scratch = workspace.scratch.data_ptr(), KINDS[self.dtype], ld
        last = len(self._sweeps) - 1
        for index, (plan, before, after, scale) in enumerate(self._sweeps):
            run(
                plan,
                _matrix(source) if index == 0 else scratch,
                _matrix(target) if index == last else scratch,
                _places(before, plan.nothing),
                _places(after, plan.nothing),
                scale,
                workspace,
            )

    def rehearse(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Compile what a run calls, or load it from disk."""
        for sweep in self._sweeps:
            sweep.plan.kernel.prepare()


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
    """Prepare and run one :class:`TwoSided` from ``w`` into ``out``, which may be ``w`` itself."""
    rotation = MatrixRotation(w, out, [TwoSided(left, right, gamma, row_gamma)], dtype)
    rotation.run(w, out, Workspace(rotation.scratch, rotation.panel))


def _sweeps(stage: TwoSided, shape: tuple[int, int], item: int, dtype: torch.dtype) -> list[_Sweep]:
    """One pass, or two where a panel with both sides would leave the cache."""
    left, right = stage.left, stage.right
    nothing = 1, False
    on_left = (left.size, left.transpose) if left else nothing
    on_right = (right.size, right.transpose) if right else nothing
    none = None, None
    before = (
        _diagonal(stage.row_gamma, left, False, shape[0], dtype),
        _diagonal(stage.gamma, right, False, shape[1], dtype),
    )
    after = (
        _diagonal(None, left, True, shape[0], dtype),
        _diagonal(None, right, True, shape[1], dtype),
    )
    scale = float(on_left[0] * on_right[0]) ** -0.5
    if left and right and left.size * right.size * dtype.itemsize > TILE_BYTES:
        first = plan_sweep(shape, nothing, on_right, item, dtype)
        second = plan_sweep(shape, on_left, nothing, dtype.itemsize, dtype)
        return [_Sweep(first, before, none, 1.0), _Sweep(second, none, after, scale)]
    return [_Sweep(plan_sweep(shape, on_left, on_right, item, dtype), before, after, scale)]


def _diagonal(
    gamma: Tensor | None, side: Side | None, transpose: bool, length: int, dtype: torch.dtype
) -> NDArray[Any] | None:
    """The diagonal along one dimension: gamma, times the signs if they stand on this end."""
    weights = None if gamma is None else as_array(gamma, dtype)
    if side is None or side.signs is None or side.transpose != transpose:
        return weights
    signs = np.tile(as_array(side.signs, dtype), length // side.size)
    return signs if weights is None else weights * signs


def _places(pair: Pair, nothing: Diagonals) -> Diagonals:
    rows, cols = pair
    return (
        *(nothing[:2] if rows is None else diagonal_of(rows)),
        *(nothing[2:] if cols is None else diagonal_of(cols)),
    )


def _matrix(w: Tensor) -> Matrix:
    return w.data_ptr(), KINDS[w.dtype], w.stride(0) * w.element_size()
