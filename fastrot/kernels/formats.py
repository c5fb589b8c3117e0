"""The number formats that a transform can be quantised to: what each code and scale means.

This file is the specification, in plain torch operations; :mod:`fastrot.kernels.gpu_formats` does
the same in registers. Every format is symmetric, rounds to nearest even and scales by the largest
magnitude of a token or of a group of consecutive elements:

========  ==============================  =====  =======================================
format    codes                           group  scales
========  ==============================  =====  =======================================
int8      int8, -127 … 127                token  float32, amax / 127
fp8       float8_e4m3fn                   token  float32, amax / 448
int4      two in a uint8, -7 … 7          token  float32, amax / 7
mxfp4     two e2m1 in a uint8             32     float8_e8m0fnu, 2^(⌊log₂ amax⌋ - 2)
nvfp4     two e2m1 in a uint8             16     float8_e4m3fn, amax / 6 · global scale
========  ==============================  =====  =======================================

A group of mxfp4 with an element that is not finite has the scale NaN, code 255. (The Triton kernels
look for none: they need finite input.)

The first three take a ``group_size`` instead of the token. Of two codes in a byte, the element of
even index has the low half. Sources: OCP, "Microscaling Formats (MX) Specification v1.0", sections
5.2 and 6.3, for e2m1, e8m0 and the exponent of mxfp4; NVIDIA, cuBLAS, "Block scaling", for nvfp4
and the blocked layout of scales.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastrot.errors import RotationError

SMALLEST_AMAX = 1e-30
"""Magnitudes below count as this in int8, fp8 and int4, so that no scale is zero."""

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of e2m1, in the order of their codes."""

NO_NUMBER = 255
"""The code of NaN in e8m0."""

BLOCK_ROWS, BLOCK_COLUMNS = 128, 4
"""Of the blocks of 512 scales that block-scaled matrix products read."""


class Format(NamedTuple):
    """A code: its largest value, dtype in memory, how many lie in one; a group if it is fixed."""

    largest: float
    codes: torch.dtype
    per_byte: int = 1
    group: int | None = None
    scales: torch.dtype = torch.float32


FORMATS = {
    "int8": Format(127.0, torch.int8),
    "fp8": Format(448.0, torch.float8_e4m3fn),
    "int4": Format(7.0, torch.uint8, 2),
    "mxfp4": Format(6.0, torch.uint8, 2, 32, torch.float8_e8m0fnu),
    "nvfp4": Format(6.0, torch.uint8, 2, 16, torch.float8_e4m3fn),
}


class Quantized(NamedTuple):
    """A quantised tensor ``(…, n)``.

    ``codes`` is ``(…, n)``, or ``(…, n / 2)`` if two lie in a byte. ``scales`` is ``(…, 1)`` for
    tokens and ``(…, n / group)`` for groups; one flat vector in the blocked layout.
    """

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Quantization:
    """How to quantise the last dimension of a tensor.

    Args:
        format: ``"int8"``, ``"fp8"``, ``"int4"``, ``"mxfp4"`` or ``"nvfp4"``.
        group_size: elements that share a scale, default all of a token; mxfp4 and nvfp4 fix it.
        global_scale: nvfp4 only: a float32 tensor with one element, on the device of the data, by
            which the scales are multiplied so that they fit e4m3; ``448 · 6 / amax`` of the whole
            tensor is usual. Default 1.
        blocked_scales: mxfp4 and nvfp4 only: scales in the order of block-scaled matrix products
            (cuBLAS, CUTLASS, torch's ``scaled_mm``): rows padded to a multiple of 128 and scales of
            a row to a multiple of 4 with zeros, blocks of 128 × 4 one after the other, and in a
            block the scale of row r, column c at ``16 · (r mod 32) + 4 · (r div 32) + c``.

    Raises:
        RotationError: an unknown format, or an argument that the format does not take.
    """

    format: str
    group_size: int | None = None
    global_scale: Tensor | None = None
    blocked_scales: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RotationError(f"format={self.format!r} is not one of {', '.join(FORMATS)}")
        fixed = FORMATS[self.format].group
        if fixed and self.group_size not in (None, fixed):
            raise RotationError(
                f"group_size={self.group_size}: {self.format} has groups of {fixed}; leave it out"
            )
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise RotationError(f"group_size={self.group_size} is not a positive even number")
        if self.global_scale is not None:
            if self.format != "nvfp4":
                raise RotationError(f"global_scale is for nvfp4 only, not for {self.format}")
            if self.global_scale.numel() != 1 or self.global_scale.dtype != torch.float32:
                raise RotationError(
                    "global_scale must be a float32 tensor with one element, got "
                    f"{self.global_scale.dtype} of shape {tuple(self.global_scale.shape)}"
                )
        if self.blocked_scales and not fixed:
            raise RotationError(
                f"blocked_scales is for mxfp4 and nvfp4 only, not for {self.format}"
            )

    @property
    def group(self) -> int | None:
        """Elements that share a scale, None for all of a token."""
        return FORMATS[self.format].group or self.group_size

    def check(self, n: int) -> None:
        """Refuse a token length that the format cannot cut.

        Raises:
            RotationError: ``n`` is no multiple of the group, or odd where two codes share one byte.
        """
        unit = self.group or FORMATS[self.format].per_byte
        if n % unit:
            what = f"groups of {unit}" if self.group else "pairs of codes"
            raise RotationError(f"{n} elements do not divide into {what} for {self.format}")

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Quantized:
        """Uninitialised memory for a tensor of this shape; scales of padding are zero."""
        self.check(shape[-1])
        codes, per_byte = FORMATS[self.format].codes, FORMATS[self.format].per_byte
        dtype = FORMATS[self.format].scales
        count = shape[-1] // self.group if self.group else 1
        out = torch.empty((*shape[:-1], shape[-1] // per_byte), dtype=codes, device=device)
        if not self.blocked_scales:
            return Quantized(out, torch.empty((*shape[:-1], count), dtype=dtype, device=device))
        rows = 1
        for length in shape[:-1]:
            rows *= length
        size = -(-rows // BLOCK_ROWS) * -(-count // BLOCK_COLUMNS) * BLOCK_ROWS * BLOCK_COLUMNS
        return Quantized(out, torch.zeros(size, dtype=torch.uint8, device=device).view(dtype))

    def quantize(self, y: Tensor) -> Quantized:
        """Quantise ``y``, ``(…, n)`` and float32 or float64, with arithmetic in its dtype."""
        self.check(y.shape[-1])
        form = FORMATS[self.format]
        groups = y.unflatten(-1, (-1, self.group or y.shape[-1]))
        amax = groups.abs().amax(-1, keepdim=True)
        if self.format == "mxfp4":
            exponent = torch.where(amax > 0, torch.frexp(amax).exponent - 3, -127).clamp(-127, 127)
            code = torch.where(amax.isfinite(), exponent + 127, NO_NUMBER)
            scales = code.to(torch.uint8).view(form.scales)
            v = torch.ldexp(groups, -exponent)
        elif self.format == "nvfp4":
            world = 1.0 if self.global_scale is None else self.global_scale.to(y.dtype)
            scales = (amax / 6 * world).clamp(max=448).float().to(form.scales)
            step = scales.to(y.dtype)
            v = torch.where(step > 0, groups * (world / step), 0.0)
        else:
            scales = (amax.clamp(min=SMALLEST_AMAX) / form.largest).to(form.scales)
            v = groups / scales.to(y.dtype)
        codes = encode(v.flatten(-2), self.format)
        scales = scales.squeeze(-1)
        return Quantized(codes, to_blocked(scales) if self.blocked_scales else scales)

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that the codes stand for, ``(…, n)``."""
        values = decode(quantized.codes, self.format).to(dtype)
        count = values.shape[-1] // self.group if self.group else 1
        scales = quantized.scales
        if self.blocked_scales:
            scales = from_blocked(scales, (*values.shape[:-1], count))
        step = scales.to(dtype).unsqueeze(-1)
        if self.global_scale is not None:
            step = step / self.global_scale.to(dtype)
        return (values.unflatten(-1, (count, -1)) * step).flatten(-2)


def empty_result(x: Tensor, quantize: Quantization | None) -> Quantized:
    """Memory for a result of the shape of ``x``: without a format, codes are its values."""
    if quantize is None:
        return Quantized(x.new_empty(x.shape), x.new_empty(0))
    return quantize.empty(x.shape, x.device)


def round_result(y: Tensor, dtype: torch.dtype, quantize: Quantization | None) -> Quantized:
    """Round ``y`` once: to its codes, or to ``dtype``."""
    if quantize is None:
        return Quantized(y.to(dtype, copy=True), y.new_empty(0, dtype=dtype))
    return quantize.quantize(y)


def encode(v: Tensor, format: str) -> Tensor:
    """Round values to codes, to nearest even; what is too large becomes the largest code."""
    form = FORMATS[format]
    v = v.clamp(-form.largest, form.largest)
    if format == "fp8":
        return v.float().to(form.codes)
    if format in ("int8", "int4"):
        codes = v.round().to(torch.int8)
    else:
        magnitude = v.abs()
        codes = torch.zeros_like(v, dtype=torch.uint8)
        for below, (level, above) in enumerate(pairwise(LEVELS)):
            tie = (level + above) / 2  # goes to the even one of codes below and below + 1
            codes += magnitude >= tie if below % 2 else magnitude > tie
        codes += 8 * torch.signbit(v).to(torch.uint8)
    if form.per_byte == 1:
        return codes
    low, high = (codes.to(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def decode(codes: Tensor, format: str) -> Tensor:
    """The float32 values of codes, before their scales."""
    if FORMATS[format].per_byte == 1:
        return codes.float()
    halves = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    if format == "int4":
        return ((halves.to(torch.int8) ^ 8) - 8).float()
    table = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=codes.device)
    return table[halves.long()]


def to_blocked(scales: Tensor) -> Tensor:
    """Scales ``(…, count)`` in the blocked layout, see :class:`Quantization`."""
    rows = scales.view(torch.uint8).flatten(0, -2) if scales.dim() > 1 else scales[None]
    height, width = (-(-rows.shape[0] // BLOCK_ROWS), -(-rows.shape[1] // BLOCK_COLUMNS))
    full = rows.new_zeros((height * BLOCK_ROWS, width * BLOCK_COLUMNS))
    full[: rows.shape[0], : rows.shape[1]] = rows
    blocks = full.view(height, 4, 32, width, BLOCK_COLUMNS).permute(0, 3, 2, 1, 4)
    return blocks.reshape(-1).view(scales.dtype)


def from_blocked(blocked: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`to_blocked` for scales of ``shape``."""
    rows = 1
    for length in shape[:-1]:
        rows *= length
    height, width = -(-rows // BLOCK_ROWS), -(-shape[-1] // BLOCK_COLUMNS)
    blocks = blocked.view(torch.uint8).view(height, width, 32, 4, BLOCK_COLUMNS)
    full = blocks.permute(0, 3, 2, 1, 4).reshape(height * BLOCK_ROWS, width * BLOCK_COLUMNS)
    return full[:rows, : shape[-1]].reshape(shape).view(blocked.dtype)
