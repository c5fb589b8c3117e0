"""Rotations of weights in Triton: few passes, one rounding.

    out = Lᵀ (diag(row_gamma) W diag(gamma)) R

What each side takes:

* R, blocks of n columns: one pass wherever H_n = H_a ⊗ H_b with a ≤ 256 and b ≤ 64, that is all
  powers of two up to 16,384 and most m · 2^k of that size.
* L, blocks of n rows: one pass up to n = 256, two above.
* R of blocks up to a tile's width rides on the last pass of L.

The right side comes first: its passes read rows of the weight as they lie. Scales and signs ride on
the first and the last pass. Between passes lies one matrix in the dtype of the arithmetic.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrot.hadamard import factors
from fastrot.kernels.weight import Side, TwoSided, Workspace

if TYPE_CHECKING:  # it imports triton, which not every platform has
    from fastrot.kernels.gpu_weight_pass import Pass

MAX_H = 256
"""Largest order of a factor along the lines of a tile that is not a single base matrix."""
MAX_BASE = 512
"""Largest base matrix that fits."""
MAX_K = 64
"""Largest order across the lines."""
Diagonals = tuple[Tensor | None, Tensor | None]

SMALL_TILE = 4096
"""Elements of a tile below which its own setup counts."""


def _widens(source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a pass must read a copy in the dtype of the arithmetic.

    Before 3.9 Triton fails at products in float64 of what was loaded in 16 bits.
    """
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    return old and dtype == torch.float64 and source.itemsize == 2


def takes(w: Tensor, *sides: Side | None) -> bool:
    """Whether :class:`TritonRotation` can run: device, Triton, memory layout, orders of sides."""
    if importlib.util.find_spec("triton") is None:
        return False
    if w.device.type != "cuda" or w.stride(-1) != 1:
        return False
    if not torch.version.hip and torch.cuda.get_device_capability(w.device)[0] < 8:
        return False
    bases = [m for side in sides if side for m in factors(side.size)[0]]
    return max(bases, default=0) <= MAX_BASE


class _Stage(NamedTuple):
    """The passes of one stage, and the diagonals before the first and behind the last."""

    passes: "tuple[Pass, ...]"
    before: Diagonals
    after: Diagonals


class TritonRotation:
    """Stages one after the other, for matrices of one shape and layout, with one rounding.

    The counterpart of :class:`fastrot.kernels.cpu_weight.MatrixRotation`. Blocks of less than 64
    share tiles, in which what is not finite spreads.

    Args:
        like: ``(rows, cols)``, a floating dtype, unit column stride, any row stride; on a CUDA or
            ROCm device, or on the CPU if Triton is interpreted.
        out: the layout of the result, likewise; the dtype may be another.
        stages: what to do; diagonals on any device.
        dtype: float64 or float32, of every intermediate.

    Attributes:
        scratch: bytes that a run needs: the matrix in ``dtype`` if there are several passes, or if
            this Triton has to read it in ``dtype``.
        panel: 0, see the counterpart.
        kind: equal where the same kernels run.
    """

    panel = 0

    def __init__(self, like: Tensor, out: Tensor, stages: Sequence[TwoSided], dtype: torch.dtype):
        from fastrot.kernels.gpu_matrix import backend_of

        backend = backend_of(like.device)
        self.shape, self.dtype = like.shape, dtype
        self._stages = [_prepared(stage, like, dtype, backend) for stage in stages]
        several = sum(len(stage.passes) for stage in self._stages) > 1
        self._widens = _widens(like.dtype, dtype)
        self.scratch = like.numel() * dtype.itemsize if several or self._widens else 0
        self.kind = (
            (like.device, like.dtype, out.dtype, dtype),
            (like.stride(0) % 16, out.stride(0) % 16, like.shape),
            tuple(
                (stage.passes, *(d is None for d in (*stage.before, *stage.after)))
                for stage in self._stages
            ),
        )

    def run(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Write the stages of ``source`` into ``target``, which may be the same memory."""
        self._launch(source, target, workspace, ahead=False)

    def rehearse(self, source: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Compile the kernels of a run, and write nothing."""
        self._launch(source, target, workspace, ahead=True)

    def _launch(self, source: Tensor, target: Tensor, workspace: Workspace, ahead: bool) -> None:
        from fastrot.kernels.gpu_weight_pass import launch_pass

        if not source.numel():
            return
        steps = [
            (step, before, after)
            for stage in self._stages
            for step, before, after in _spread(stage)
        ]
        scratch = workspace.matrix(self.shape, self.dtype) if self.scratch else target
        if self._widens:
            source = scratch if ahead else scratch.copy_(source)
        with torch.cuda.device(source.device) if source.is_cuda else contextlib.nullcontext():
            for index, (step, before, after) in enumerate(steps):
                result = target if index == len(steps) - 1 else scratch
                launch_pass(source, result, before, after, step, self.dtype, ahead)
                source = result


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
    from fastrot.kernels.gpu_matrix import interpreted

    if interpreted() and torch.bfloat16 in (w.dtype, out.dtype):
        # The interpreter has no bfloat16 arithmetic; the arithmetic's dtype holds the same values.
        wide = w.to(dtype)
        rotate_matrix(
            wide, wide, left=left, right=right, gamma=gamma, row_gamma=row_gamma, dtype=dtype
        )
        out.copy_(wide)
        return
    rotation = TritonRotation(w, out, [TwoSided(left, right, gamma, row_gamma)], dtype)
    workspace = Workspace(rotation.scratch, rotation.panel, w.device)
    rotation.rehearse(w, out, workspace)
    rotation.run(w, out, workspace)


def _prepared(stage: TwoSided, like: Tensor, dtype: torch.dtype, backend: str) -> _Stage:
    left, right = stage.left, stage.right
    rows, columns = like.shape
    return _Stage(
        passes(
            None if left is None else (left.size, left.transpose),
            None if right is None else (right.size, right.transpose),
            backend,
        ),
        (
            _weights(stage.row_gamma, left, False, rows, like.device, dtype),
            _weights(stage.gamma, right, False, columns, like.device, dtype),
        ),
        (
            _weights(None, left, True, rows, like.device, dtype),
            _weights(None, right, True, columns, like.device, dtype),
        ),
    )


def _spread(stage: _Stage) -> "Iterator[tuple[Pass, Diagonals, Diagonals]]":
    """The passes, each with the diagonals that ride on it."""
    nothing = None, None
    last = len(stage.passes) - 1
    for index, step in enumerate(stage.passes):
        yield (
            step,
            stage.before if index == 0 else nothing,
            stage.after if index == last else nothing,
        )


def _weights(
    gamma: Tensor | None,
    side: Side | None,
    transpose: bool,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    """The diagonal along one dimension: gamma, times the signs if they stand on this end."""
    weights = None if gamma is None else gamma.detach().to(device, dtype).contiguous()
    if side is None or side.signs is None or side.transpose != transpose:
        return weights
    signs = side.signs.detach().to(device, dtype).repeat(length // side.size)
    return signs if weights is None else weights * signs


@functools.lru_cache(maxsize=1024)
def passes(
    left: tuple[int, bool] | None, right: tuple[int, bool] | None, backend: str
) -> "tuple[Pass, ...]":
    """The passes of two sides, each an order and whether its transpose acts; at least one."""
    from fastrot.kernels.gpu_axis import Factor
    from fastrot.kernels.gpu_weight_pass import Pass

    along = () if right is None else _cut(*right, False)
    down = () if left is None else _cut(*left, True)
    if along and down and right is not None:
        size = right[0]
        last = down[-1]
        # A factor of order 128 takes 128 KiB of shared memory, which Hopper was the first to have.
        wide = 128 if backend in ("hopper", "blackwell") and last.h.size <= 64 else 64
        if 128 % size == 0 and size <= wide and last.h.size <= MAX_H:
            along, down = (), (*down[:-1], replace(last, k=Factor((), size, size)))
    return (*along, *down) or (Pass(True, Factor((), 1, 1), False, 1),)


def _cut(size: int, transpose: bool, down: bool) -> "tuple[Pass, ...]":
    """The fewest passes over the factors of H_size, of these the least arithmetic."""
    from fastrot.kernels.gpu_axis import Factor
    from fastrot.kernels.gpu_matrix import padded
    from fastrot.kernels.gpu_weight_pass import Pass

    bases, power = factors(size)
    atoms = (*bases, *[2] * (power.bit_length() - 1))

    def factor(start: int, stop: int) -> Factor:
        split = max(start, min(stop, len(bases)))
        return Factor(atoms[start:split], 2 ** (stop - split), math.prod(atoms[start:stop]))

    @functools.cache
    def best(start: int) -> tuple[int, float, tuple[Pass, ...]]:
        """Number of passes, multiplications per element, passes from this factor on."""
        choices: list[tuple[int, float, tuple[Pass, ...]]] = []
        for stop in range(start + 1, len(atoms) + 1):
            h, k = factor(start, stop), factor(stop, len(atoms))
            P, Q = padded(h.size), padded(k.size)
            if P > MAX_H and stop > start + 1:
                break
            step = Pass(down, h, transpose, k.size)
            if stop == len(atoms):
                choices.append((1, P * P / h.size, (step,)))
                continue
            count, cost, rest = best(stop)
            choices.append((1 + count, P * P / h.size + cost, (step, *rest)))
            if not down and P <= MAX_H and Q <= MAX_K:
                cost = (P + Q) * (P / h.size) * (Q / k.size)
                cost *= max(1.0, SMALL_TILE / (h.size * k.size))
                choices.append((1, cost, (replace(step, k=k, k_transpose=transpose),)))
        return min(choices, key=lambda choice: choice[:2])

    return best(0)[2] if size > 1 else ()
