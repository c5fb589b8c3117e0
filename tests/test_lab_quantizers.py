"""Simulated quantization against brute force: every level written out, the nearest one taken."""

import math

import pytest
import torch
from helpers import levels, relative_error

from fastrot import RotationError
from fastrot.kernels.formats import LEVELS, Quantization
from fastrot.lab.quantizers import CLIPS, asymmetric_grid, fake_quantize, symmetric_grid
from fastrot.lab.schemes import Numbers, Scheme


def round_symmetric(x, bits, clip=1.0):
    return symmetric_grid(x, bits, clip).nearest(x)


def round_asymmetric(x, bits, clip=1.0):
    return asymmetric_grid(x, bits, clip).nearest(x)


ROUNDINGS = {round_symmetric: lambda bits: 2**bits - 1, round_asymmetric: lambda bits: 2**bits}
BITS = (2, 3, 4, 8)


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def with_outliers(*shape, dtype=torch.float64):
    x = noise(*shape, dtype=dtype)
    x[..., ::17] *= 20
    return x


def nearest(x, grid):
    """The member of ``grid`` nearest to each element, by trying all."""
    return grid[(x.unsqueeze(-1) - grid).abs().argmin(-1)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_uses_all_its_levels_and_no_more(rounding, bits):
    x = rounding(noise(5, 7, 4096), bits)
    assert levels(x) <= ROUNDINGS[rounding](bits)
    # Evenly spread, so that none is skipped.
    assert levels(rounding(torch.linspace(-1, 1, 4096), bits)) == ROUNDINGS[rounding](bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_twice_is_rounding_once(rounding, dtype):
    x = rounding(noise(64, 96, dtype=dtype), 4)
    assert x.dtype == dtype
    torch.testing.assert_close(rounding(x, 4), x, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_goes_to_the_nearest_level(rounding, bits):
    x = noise(64, 96, dtype=torch.float64)
    spread = 2 * x.abs().amax(-1) if rounding is round_symmetric else x.amax(-1) - x.amin(-1)
    step = spread / (ROUNDINGS[rounding](bits) - 1)
    error = (rounding(x, bits) - x).abs().amax(-1)
    assert (error <= 0.5 * step * (1 + 1e-9)).all()
    assert (error > 0.3 * step).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_more_bits_less_error(rounding):
    x = noise(64, 96)
    errors = [relative_error(rounding(x, bits), x) for bits in range(2, 13)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < 0.1 < errors[0]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_vector_has_a_scale_of_its_own(rounding):
    x = noise(3, 4, 32)
    factors = torch.tensor([1.0, 1024.0, 2.0**-20, -4.0])[:, None]
    if rounding is round_asymmetric:
        factors = factors.abs()
    assert torch.equal(rounding(x * factors, 4), rounding(x, 4) * factors)
    assert torch.equal(rounding(x[1], 4), rounding(x, 4)[1])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30])
def test_constant_vectors_stay(rounding, value):
    x = torch.full((2, 8), value)
    assert torch.equal(rounding(x, 4), x)


def test_symmetric_keeps_zero_and_asymmetric_the_ends():
    x = noise(16, 33)
    x[:, 0] = 0.0
    assert (round_symmetric(x, 4)[:, 0] == 0).all()
    assert torch.equal(round_symmetric(-x, 4), -round_symmetric(x, 4))
    rounded = round_asymmetric(x, 4)
    assert torch.equal(rounded.amin(-1), x.amin(-1))
    torch.testing.assert_close(rounded.amax(-1), x.amax(-1))


@pytest.mark.parametrize("bits", BITS)
def test_integers_are_the_nearest_levels(bits):
    for row in with_outliers(6, 64):
        most = 2 ** (bits - 1) - 1
        grid = torch.arange(-most, most + 1) * (row.abs().max() / most)
        got = fake_quantize(row, Numbers(bits=bits))
        torch.testing.assert_close(got, nearest(row, grid), rtol=1e-12, atol=0)
        grid = torch.linspace(row.min(), row.max(), 2**bits, dtype=torch.float64)
        got = fake_quantize(row, Numbers(bits=bits, symmetric=False))
        torch.testing.assert_close(got, nearest(row, grid), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_integers_mean_what_the_kernels_codes_mean(bits, group):
    x = with_outliers(5, 64, dtype=torch.float32)
    form = Quantization(f"int{bits}", group)
    per = "group" if group else "vector"
    got = fake_quantize(x, Numbers(bits=bits, per=per, group=group))
    assert torch.equal(got, form.dequantize(form.quantize(x)))


def test_fp8_is_the_nearest_e4m3():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[codes.isfinite()]
    for row in with_outliers(4, 96):
        scale = (row.abs().max() / 448).float().double()
        # The codes are taken in float32, which could only matter next to a tie.
        got = fake_quantize(row, Numbers.of("fp8"))
        torch.testing.assert_close(got, nearest(row / scale, codes) * scale, rtol=1e-12, atol=0)


def e2m1():
    return torch.tensor([*LEVELS, *(-level for level in LEVELS[1:])], dtype=torch.float64)


def test_mxfp4_has_powers_of_two_for_every_32():
    x = with_outliers(4, 96)
    rounded = fake_quantize(x, Numbers.of("mxfp4")).view(-1, 32)
    for row, got in zip(x.view(-1, 32), rounded, strict=True):
        step = 2.0 ** (math.floor(math.log2(float(row.abs().max()))) - 2)
        assert torch.equal(got, nearest(row / step, e2m1()) * step)


def test_nvfp4_scales_are_e4m3_under_one_for_the_tensor():
    x = with_outliers(4, 96)
    world = float((448 * 6 / x.abs().max().float()).double())
    rounded = fake_quantize(x, Numbers.of("nvfp4")).view(-1, 16)
    for row, got in zip(x.view(-1, 16), rounded, strict=True):
        scale = (row.abs().max() / 6 * world).float().to(torch.float8_e4m3fn).double() / world
        torch.testing.assert_close(got, nearest(row / scale, e2m1()) * scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("format", ["fp8", "mxfp4", "nvfp4"])
def test_tiny_and_huge_tensors_stay_finite(format, size):
    x = with_outliers(4, 96, dtype=torch.float32) * size
    got = fake_quantize(x, Numbers.of(format))
    assert got.isfinite().all()
    if size in (0.0, 1e30):
        assert (got - x).abs().max() <= 0.3 * x.abs().max()


ALL = ["w4", "w4g16", "w4mse", "afp8", "afp8t", "a8t", "wfp8g16", "mxfp4", "nvfp4"]


def numbers_of(name):
    scheme = Scheme.parse(name)
    return scheme.weights or scheme.activations


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ALL)
def test_what_is_broken_does_not_look_healthy(name, bad):
    """A loss of a model whose activations are not finite must not be finite either."""
    x = noise(3, 64, dtype=torch.float32)
    x[1, 5] = bad
    assert not fake_quantize(x, numbers_of(name))[1, :16].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,)])
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_rounded_to_nothing(name, shape):
    x = torch.empty(shape, dtype=torch.bfloat16)
    got = fake_quantize(x, numbers_of(name))
    assert (got.shape, got.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_is_a_vector_of_its_own(symmetric):
    x = with_outliers(3, 5, 64)
    grouped = fake_quantize(x, Numbers(per="group", group=16, symmetric=symmetric))
    apart = fake_quantize(x.view(3, 5, 4, 16), Numbers(symmetric=symmetric))
    assert torch.equal(grouped, apart.view_as(x))
    assert not torch.equal(grouped, fake_quantize(x, Numbers(symmetric=symmetric)))


@pytest.mark.parametrize("numbers", [Numbers(per="tensor"), Numbers("fp8", None, per="tensor")])
def test_a_tensor_has_one_scale(numbers):
    x = with_outliers(3, 5, 64)
    flat = fake_quantize(x.flatten(), Numbers(numbers.format, numbers.bits))
    assert torch.equal(fake_quantize(x, numbers), flat.view_as(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_clip_is_the_best_of_all_that_are_tried(bits, symmetric):
    x = with_outliers(12, 64)
    rounding = round_symmetric if symmetric else round_asymmetric
    tried = [(rounding(x, bits, clip) - x).square().sum(-1) for clip in (1.0, *CLIPS)]
    clipped = fake_quantize(x, Numbers(bits=bits, symmetric=symmetric, clip="mse"))
    error = (clipped - x).square().sum(-1)
    torch.testing.assert_close(error, torch.stack(tried).amin(0), rtol=1e-12, atol=0)
    assert (error < tried[0]).any()
    assert levels(clipped) <= 2**bits


def test_a_clip_cuts_both_ends_and_keeps_the_middle():
    x = torch.linspace(-3, 5, 33, dtype=torch.float64)
    assert fake_quantize(x, Numbers(bits=16)).abs().max() == 5
    half = round_asymmetric(x, 4, 0.5)
    assert (half.min(), half.max()) == (-1, 3)
    assert round_symmetric(x, 4, 0.5).aminmax() == (-2.5, 2.5)


@pytest.mark.parametrize("numbers", [Numbers(bits=8), Numbers(symmetric=False, clip="mse")])
def test_bfloat16_is_rounded_once(numbers):
    x = noise(7, 64, dtype=torch.bfloat16)
    assert torch.equal(fake_quantize(x, numbers), fake_quantize(x.float(), numbers).bfloat16())


@pytest.mark.parametrize("numbers", [Numbers(per="group", group=48), Numbers.of("mxfp4")])
def test_groups_that_do_not_fit_are_refused(numbers):
    with pytest.raises(RotationError, match="elements do not divide into groups of"):
        fake_quantize(noise(2, 80), numbers)
