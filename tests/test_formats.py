"""The number formats against their definitions, spelled out in Python floats and fractions."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrot.kernels.formats import (
    FORMATS,
    Quantization,
    decode,
    encode,
    from_blocked,
    to_blocked,
)

E2M1 = [Fraction(s) for s in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def e4m3(code: int) -> Fraction:
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8 * 2**6)
    return Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


LEVELS = {
    "int8": [Fraction(i) for i in range(128)],
    "fp8": [e4m3(code) for code in range(127)],
    "int4": [Fraction(i) for i in range(8)],
    "mxfp4": E2M1,
}


def nearest(v: float, levels: list[Fraction]) -> Fraction:
    """The level next to |v|; of two, the one of even code; with the sign of v."""
    exact = min(Fraction(abs(v)), levels[-1])
    code = min(range(len(levels)), key=lambda c: (abs(levels[c] - exact), c % 2))
    return levels[code] * (-1 if v < 0 else 1)


@pytest.mark.parametrize("format", LEVELS)
def test_codes_are_the_nearest_and_ties_go_to_even(format):
    levels = LEVELS[format]
    ties = [float((a + b) / 2) for a, b in itertools.pairwise(levels)]
    values = [float(level) for level in levels] + ties
    values += [v * (1 + s * 2**-20) for v in ties for s in (-1, 1)] + [float(levels[-1]) * 1.2]
    values += [-v for v in values]
    values += [0.0] * (-len(values) % 2)
    v = torch.tensor(values)
    want = [float(nearest(x, levels)) for x in v.tolist()]
    assert decode(encode(v, format), format).tolist() == want


@given(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32))
def test_the_element_of_even_index_has_the_low_half(low, high):
    code = encode(torch.tensor([low, high]), "mxfp4").item()
    bits = [code & 15, code >> 4]
    assert [float(E2M1[b & 7]) for b in bits] == [abs(float(nearest(v, E2M1))) for v in (low, high)]
    assert [b >> 3 for b in bits] == [torch.signbit(torch.tensor(v)).item() for v in (low, high)]


def test_the_shared_exponent_of_mxfp4():
    """OCP's 2^(floor(log2(amax)) - emax of e2m1), where the latter is 2."""
    amax = torch.tensor([1.0, 1.5, 1.9999, 2.0, 6.0, 8.0, 2.0**-20, 3e38, 0.0])
    x = torch.zeros(len(amax), 32)
    x[:, 7] = -amax
    scales = Quantization("mxfp4").quantize(x).scales.flatten()
    exponents = scales.view(torch.uint8).int() - 127
    assert exponents.tolist() == [-2, -2, -2, -1, 0, 1, -22, 125, -127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("blocked", [False, True])
def test_a_group_of_mxfp4_that_is_not_finite_is_nan(bad, dtype, blocked):
    """It became ordinary numbers; the groups beside it do not notice."""
    x = torch.randn(3, 96, dtype=dtype)
    form = Quantization("mxfp4", blocked_scales=blocked)
    want = form.dequantize(form.quantize(x), dtype)
    want[1, 32:64] = torch.nan
    x[1, 40] = bad
    got = form.dequantize(form.quantize(x), dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_scales_of_nvfp4_use_the_global_scale():
    x = torch.randn(4, 64, dtype=torch.float64)
    world = torch.tensor([448 * 6 / x.abs().max().item()])
    plain, scaled = Quantization("nvfp4"), Quantization("nvfp4", global_scale=world)
    assert scaled.quantize(x).scales.float().max() == 448
    for q in (plain, scaled):
        step = q.quantize(x).scales.double() / (1 if q is plain else world.double())
        want = x.unflatten(-1, (-1, 16)).abs().amax(-1) / 6
        torch.testing.assert_close(step, want, rtol=1 / 16, atol=0)
        error = q.dequantize(q.quantize(x), torch.float64) - x
        assert (error.unflatten(-1, (-1, 16)).abs() <= step[..., None] * 1.35).all()


@pytest.mark.parametrize("format", FORMATS)
def test_dequantised_values_are_within_half_a_step(format):
    x = torch.randn(5, 96, dtype=torch.float64)
    q = Quantization(format)
    steps = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 1 / 28, "mxfp4": 1 / 4, "nvfp4": 1 / 5}
    groups = x.unflatten(-1, (-1, q.group or 96))
    error = (q.dequantize(q.quantize(x), torch.float64) - x).unflatten(-1, (-1, q.group or 96))
    assert (error.abs() <= groups.abs().amax(-1, keepdim=True) * steps[format] * 1.001).all()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zero(format):
    q = Quantization(format)
    assert not q.dequantize(q.quantize(torch.zeros(2, 64))).any()


@pytest.mark.parametrize("shape", [(1, 1), (130, 5), (2, 64, 8), (0, 4)])
def test_the_blocked_layout(shape):
    scales = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).to(torch.uint8).view(shape)
    blocked = to_blocked(scales)
    assert torch.equal(from_blocked(blocked, shape), scales)
    flat = scales.flatten(0, -2)
    columns = -(-shape[-1] // 4)
    assert blocked.numel() == -(-len(flat) // 128) * columns * 512
    for r in range(len(flat)):
        for c in range(shape[-1]):
            at = (r // 128 * columns + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            assert blocked[at] == flat[r, c]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp4"}, "format='fp4' is not one of int8, fp8"),
        ({"format": "mxfp4", "group_size": 16}, "mxfp4 has groups of 32"),
        ({"format": "int4", "group_size": 3}, "not a positive even number"),
        ({"format": "fp8", "global_scale": torch.ones(1)}, "for nvfp4 only"),
        ({"format": "nvfp4", "global_scale": torch.ones(2)}, "float32 tensor with one element"),
        ({"format": "int8", "blocked_scales": True}, "for mxfp4 and nvfp4 only"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**arguments)


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="40 elements do not divide into groups of 32"):
        Quantization("mxfp4").quantize(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="pairs of codes"):
        Quantization("int4").quantize(torch.zeros(2, 7))
