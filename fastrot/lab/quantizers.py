"""Simulated quantization: numbers are rounded to what a format can hold, and stay floats.

Round to nearest, without calibration. Integers have ``2**bits - 1`` levels around zero, or
``2**bits`` over a range; the other formats are those of :mod:`fastrot.kernels.formats`, where what
their codes mean is specified. nvfp4 takes the usual global scale, from the whole tensor.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrot.errors import RotationError
from fastrot.kernels.formats import Quantization
from fastrot.lab.schemes import Numbers

CLIPS = tuple(1 - step / 32 for step in range(1, 20))
"""Shares of the range that ``clip="mse"`` tries, besides all of it."""


def fake_quantize(x: Tensor, numbers: Numbers) -> Tensor:
    """Round a tensor as a format would, with arithmetic in float32 or, if it is that, float64.

    Args:
        x: floating point, any shape; the last dimension is that of the inputs, channels or head.
        numbers: the format.

    Returns:
        Shape and dtype of ``x``; what shares a scale with NaN or infinity is not finite.

    Raises:
        RotationError: the last dimension does not divide into groups.
    """
    if not x.numel():
        return x.clone()
    work = x if x.dtype == torch.float64 else x.float()
    if numbers.format != "int":
        return _round_float(work, numbers).to(x.dtype)
    if numbers.per == "tensor":
        work = work.reshape(-1)
    elif numbers.group:
        if work.shape[-1] % numbers.group:
            raise RotationError(
                f"{work.shape[-1]} elements do not divide into groups of {numbers.group}"
            )
        work = work.unflatten(-1, (-1, numbers.group))
    return grid_of(work, numbers).nearest(work).reshape(x.shape).to(x.dtype)


class Grid(NamedTuple):
    """Evenly spaced levels ``low + step · i``, ``i`` from ``least`` to ``most``.

    ``step`` and ``low`` have one element for every vector, and a last dimension of 1.
    """

    step: Tensor
    low: Tensor
    least: int
    most: int

    def nearest(self, x: Tensor) -> Tensor:
        """The level nearest to each element."""
        return ((x - self.low) / self.step).round().clamp(self.least, self.most) * self.step + (
            self.low
        )


def grid_of(x: Tensor, numbers: Numbers) -> Grid:
    """The levels for every vector along the last dimension.

    Args:
        x: any shape, floating point; vectors or groups along the last dimension.
        numbers: integers.
    """
    assert numbers.bits is not None
    make = symmetric_grid if numbers.symmetric else asymmetric_grid
    best = make(x, numbers.bits)
    if numbers.clip == "max":
        return best
    least = (best.nearest(x) - x).square().sum(-1, keepdim=True)
    for clip in CLIPS:
        tried = make(x, numbers.bits, clip)
        error = (tried.nearest(x) - x).square().sum(-1, keepdim=True)
        better = error < least
        step, low = (
            torch.where(better, new, old) for new, old in zip(tried[:2], best[:2], strict=True)
        )
        best = best._replace(step=step, low=low)
        least = torch.minimum(error, least)
    return best


def symmetric_grid(x: Tensor, bits: int, clip: float = 1.0) -> Grid:
    """``2**bits - 1`` levels around zero.

    Args:
        x: any shape, floating point; vectors along the last dimension.
        bits: at least 2.
        clip: the outermost level, as a share of the largest magnitude.
    """
    most = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) * clip / most
    step = step.clamp_min(torch.finfo(x.dtype).tiny)
    return Grid(step, torch.zeros_like(step), -most, most)


def asymmetric_grid(x: Tensor, bits: int, clip: float = 1.0) -> Grid:
    """``2**bits`` levels over the range of a vector.

    Args:
        x: any shape, floating point; vectors along the last dimension.
        bits: at least 1.
        clip: the range of the levels, as a share of that from least to greatest, around its middle.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    spread = high - low
    low = low + spread * ((1 - clip) / 2)
    step = (spread * clip / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    return Grid(step, low, 0, 2**bits - 1)


def _round_float(x: Tensor, numbers: Numbers) -> Tensor:
    whole = None
    if numbers.format == "nvfp4":
        largest = x.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
        whole = (448 * 6 / largest).clamp(max=torch.finfo(torch.float32).max).reshape(1)
    form = Quantization(
        numbers.format, numbers.group if numbers.format == "fp8" else None, global_scale=whole
    )
    flat = x.reshape(1, -1) if numbers.per == "tensor" else x
    return form.dequantize(form.quantize(flat), x.dtype).reshape(x.shape)
