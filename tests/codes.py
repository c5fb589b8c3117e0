"""When codes and scales are right: but for what float32 can't decide."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastrot.kernels.formats import Quantization, Quantized, decode, encode, from_blocked

ARITHMETIC = 2.0**-15
"""Error of a kernel's float32 result before it is quantised, in magnitudes of its largest element.

Intermediates keep 16 bits, an error of 2^-17 each, of which a sum adds up a few.
"""
AMBIGUOUS = 0.004
"""Share of codes that may differ: codes are up to 254 steps wide, and 254 · 2 · ARITHMETIC = 0.016
is the most, if all errors were as large."""


def assert_codes(got: Quantized, truth: Tensor, quantize: Quantization) -> float:
    """Codes and scales quantise ``truth``; returns the share of codes that are not the exact ones.

    A scale lies between those of slightly smaller and slightly larger values. A code is nearest
    to the exact value over that scale, or as near as the arithmetic can tell.
    """
    truth = truth.double().cpu().reshape(-1, truth.shape[-1])
    if quantize.global_scale is not None:
        quantize = replace(quantize, global_scale=quantize.global_scale.cpu())
    got = Quantized(*(t.cpu() for t in got))
    n, groups = truth.shape[-1], truth.shape[-1] // (quantize.group or truth.shape[-1])
    low, high, scales = (
        _scales(s, len(truth), groups, quantize)
        for s in (
            quantize.quantize(truth * (1 - ARITHMETIC)).scales,
            quantize.quantize(truth * (1 + ARITHMETIC)).scales,
            got.scales,
        )
    )
    assert (low * (1 - 2**-22) <= scales).all()
    assert (scales <= high * (1 + 2**-22)).all()
    step = scales.unsqueeze(-1)
    world = 1.0 if quantize.global_scale is None else quantize.global_scale.double()
    v = truth.unflatten(-1, (groups, -1)) * world / step
    v = torch.where(step > 0, v, 0.0).reshape(-1, n)
    chosen, nearest = (
        decode(codes, quantize.format).double().view(v.shape)
        for codes in (got.codes, encode(v, quantize.format))
    )
    slack = 2 * ARITHMETIC * v.unflatten(-1, (groups, -1)).abs().amax(-1, keepdim=True)
    excess = ((chosen - v).abs() - (nearest - v).abs()).unflatten(-1, (groups, -1))
    assert (excess <= slack).all()
    differ = (chosen != nearest).double().mean().item()
    assert differ <= AMBIGUOUS
    return differ


def _scales(scales: Tensor, rows: int, groups: int, quantize: Quantization) -> Tensor:
    if quantize.blocked_scales:
        scales = from_blocked(scales, (rows, groups))
    return scales.double().view(rows, groups)


@pytest.fixture
def poisoned(monkeypatch):
    """Results of the fused operators lie in poisoned memory; no byte around them may change."""
    from fastrot.kernels import formats, fused, rope

    margins = []

    def surrounded(t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        memory = torch.full((size + 512,), 0xA5, dtype=torch.uint8, device=t.device)
        margins.append((memory[:256], memory[256 + size :]))
        return memory[256 : 256 + size].view(t.dtype).view(t.shape)

    def empty_result(x: Tensor, quantize: Quantization | None) -> Quantized:
        codes, scales = formats.empty_result(x, quantize)
        blocked = quantize is not None and quantize.blocked_scales
        return Quantized(surrounded(codes), scales if blocked else surrounded(scales))

    monkeypatch.setattr(fused, "empty_result", empty_result)
    monkeypatch.setattr(rope, "empty_result", empty_result)
    yield
    assert margins
    assert all((side == 0xA5).all() for pair in margins for side in pair)
