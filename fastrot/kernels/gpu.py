"""Hadamard transforms in Triton, for CUDA and ROCm tensors and for Triton's interpreter.

Which way a vector of length n = m · 2^k goes:

* few rows into another tensor: :mod:`fastrot.kernels.gpu_few`, where many programs share a vector.
* rows (the vectors lie along the last dimension), float32 and 16-bit: one pass of
  :mod:`fastrot.kernels.gpu_rows` wherever two Kronecker factors of H_n fit a tile; that is every
  power of two up to 32,768 and most m · 2^k of that size (up to 16,384 for float32 but on
  Blackwell, and there with Triton before 3.9).
* everything else: passes of :mod:`fastrot.kernels.gpu_axis`, one factor each (followed by one pass
  over rows if the vectors are rows and what is left fits), through a float32 scratch tensor if the
  result is 16-bit. Nothing is rounded to 16 bits between passes. float64 always goes this way.
"""

import contextlib
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrot.hadamard import factors

if TYPE_CHECKING:  # they import triton, which not every platform has
    from fastrot.kernels.gpu_axis import Factor
    from fastrot.kernels.gpu_tiles import Tile


FEW = 4
"""Programs on each multiprocessor up to which vectors are shared by several."""


MOST = 1 << 30
"""Vectors of a launch: the kernels count them in 32 bits."""


class Route(NamedTuple):
    """The passes over the factors of H_n from left to right; the last may be one over rows."""

    passes: "tuple[Factor, ...]"
    tile: "Tile | None"


def transform(x: Tensor, out: Tensor, signs: Tensor | None, scale: float, transpose: bool) -> None:
    """Write ``scale · (x D) H`` into ``out``, or ``scale · (x Hᵀ) D`` if ``transpose``.

    Args:
        x: contiguous ``(outer, n, inner)``, float64, float32, bfloat16 or float16.
        out: as ``x``, may be ``x``; rounded to its dtype once. Intermediates are float32, or
            float64 for float64.
        signs: ``(n,)`` of ±1 on the device of ``x``, any real dtype, or None for the identity.
        scale: factor of the result.
        transpose: apply the transpose.

    The first transform of an order that is not a power of two copies its base matrix to the
    device. Run it once before a CUDA graph is captured.

    Raises:
        RuntimeError: Triton is not installed, or ``x`` is on the CPU and Triton not interpreted.
    """
    _check(x)
    if x.numel() == 0:
        return
    if x.shape[0] > MOST:
        for part, result in zip(x.split(MOST), out.split(MOST), strict=True):
            transform(part, result, signs, scale, transpose)
        return
    from fastrot.kernels.gpu_axis import launch_axis
    from fastrot.kernels.gpu_few import cut_for, is_exact, launch_few
    from fastrot.kernels.gpu_matrix import backend_of, interpreted
    from fastrot.kernels.gpu_rows import launch_rows

    if interpreted() and x.dtype == torch.bfloat16:
        # The interpreter has no bfloat16 arithmetic and truncates; float32 holds the same values.
        wide = x.float()
        transform(wide, wide, signs, scale, transpose)
        out.copy_(wide)
        return
    _, n, inner = x.shape
    bases, power = factors(n)
    backend = backend_of(x.device)
    if inner == 1 and x.dtype != torch.float64 and x.data_ptr() != out.data_ptr():
        exact = is_exact(x.dtype, signs is not None, transpose)
        cut = cut_for(bases, power, exact, backend)
        if cut is not None and x.numel() // n * cut.blocks <= FEW * _multiprocessors(x.device):
            with _guard(x):
                launch_few(x, out, signs, scale, transpose, cut)
            return
    route = _route(bases, power, inner == 1, x.dtype, backend)
    count = len(route.passes) + (route.tile is not None)
    # The result itself can hold exact intermediates if it is wide enough.
    scratch = out
    if count > 1 and x.dtype not in (torch.float32, torch.float64):
        scratch = torch.empty_like(x, dtype=torch.float32)
    order = range(count)
    source, processors = x, _multiprocessors(x.device)
    with _guard(x):
        for step, index in enumerate(reversed(order) if transpose else order):
            last = step == count - 1
            target = out if last else scratch
            factor = scale if last else 1.0
            d = signs if index == 0 else None
            if index < len(route.passes):
                done = 1
                for previous in route.passes[: index + 1]:
                    done *= previous.size
                run = n // done * inner
                launch_axis(
                    *(source, target, d, factor, transpose),
                    *(route.passes[index], run, processors, inner),
                )
            elif route.tile is not None:
                launch_rows(source, target, d, factor, transpose, route.tile, processors)
            source = target


def _check(x: Tensor) -> None:
    way_out = (
        "impl='triton' needs a CUDA or ROCm tensor; on CPU set TRITON_INTERPRET=1 before the first "
        "import of triton, or use impl='cpu'"
    )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"triton is not installed: {way_out}") from error
    if x.device.type == "cuda":
        return
    from fastrot.kernels.gpu_matrix import interpreted

    if x.device.type != "cpu" or not interpreted():
        raise RuntimeError(f"got a {x.device.type} tensor: {way_out}")


def _guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _route(
    bases: tuple[int, ...], power: int, rows: bool, dtype: torch.dtype, backend: str
) -> Route:
    """The route with the fewest passes, among those the one with the least arithmetic."""
    from fastrot.kernels.gpu_axis import Factor
    from fastrot.kernels.gpu_matrix import padded
    from fastrot.kernels.gpu_tiles import tile_for

    atoms = (*bases, *[2] * (power.bit_length() - 1))
    # Largest order of a pass that is not a single base matrix.
    limit = 64 if dtype == torch.float64 else 256

    def factor(start: int, stop: int) -> Factor:
        size = 1
        for m in atoms[start:stop]:
            size *= m
        split = max(start, min(stop, len(bases)))
        return Factor(atoms[start:split], 2 ** (stop - split), size)

    @functools.cache
    def best(start: int) -> tuple[tuple[int, int, float], Route]:
        """The best route for the factors from ``start`` on, with its passes and its arithmetic."""
        choices = []
        if rows and dtype != torch.float64:
            rest = factor(start, len(atoms))
            # A pass over rows that is not the only one reads or writes float32.
            source = torch.float32 if start else dtype
            tile = tile_for(rest.bases, rest.power, source, dtype, backend)
            if tile is not None:
                choices.append(((1, 0, tile.cost), Route((), tile)))
        for stop in range(start + 1, len(atoms) + 1) if atoms else (0,):
            f = factor(start, stop)
            if padded(f.size) > limit and stop > start + 1:
                break
            cost = 3 * padded(f.size) ** 2 / f.size
            (passes, strided, more), route = (0, 0, 0.0), Route((), None)
            if stop < len(atoms):
                (passes, strided, more), route = best(stop)
            choices.append(
                (
                    (passes + 1, strided + 1, cost + more),
                    Route((f, *route.passes), route.tile),
                )
            )
        return min(choices, key=lambda choice: choice[0])

    return best(0)[1]
