"""RoPE fused with R3 and the quantisation of a cache, against float64."""

import pytest
import torch
from codes import assert_codes, poisoned  # noqa: F401
from oracles import transformed
from test_fused_kernels import DEVICE, IMPLEMENTATIONS, TRITON, assert_close, data
from torch import Tensor

from fastrot.kernels import rope_hadamard
from fastrot.kernels.formats import FORMATS, Quantization

TOKENS, HEADS, KV_HEADS = 5, 6, 2


def tables(
    positions: int, rotary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = torch.arange(positions)[:, None] * frequencies + 0.3
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def embedded(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair of elements as a complex number, multiplied by its phase, in float64."""
    half = cos.shape[-1]
    phase = torch.complex(cos.double(), sin.double())[:, None]
    y = x.double().clone()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    turned = torch.complex(y[..., first], y[..., second]) * phase
    y[..., first], y[..., second] = turned.real, turned.imag
    return y


def heads(size: int, dtype: torch.dtype = torch.float16, value_size: int = 0) -> list[Tensor]:
    """Slices of one fused projection: tokens and heads have strides."""
    counts = (HEADS, KV_HEADS, KV_HEADS)
    sizes = [HEADS * size, KV_HEADS * size, KV_HEADS * (value_size or size)]
    parts = data(TOKENS, sum(sizes), dtype=dtype).split(sizes, -1)
    return [p.unflatten(-1, (n, -1)) for p, n in zip(parts, counts, strict=True)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("size", "rotary", "block"),
    [(64, 64, 64), (128, 128, 128), (128, 32, 16), (96, 48, 96), (80, 80, 80), (256, 64, 256)],
)
def test_rotated_heads(impl, dtype, interleaved, size, rotary, block):
    q, k, _ = heads(size, dtype)
    cos, sin = tables(TOKENS, rotary)
    got = rope_hadamard(q, k, cos, sin, interleaved=interleaved, block_size=block, impl=impl)
    assert got.v is None
    for out, x in ((got.q, q), (got.k, k)):
        assert (out.dtype, out.shape) == (dtype, x.shape)
        assert out.is_contiguous()
        assert_close(out, transformed(embedded(x, cos, sin, interleaved), block))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "form",
    [
        *map(Quantization, FORMATS),
        Quantization("int4", 32),
        Quantization("nvfp4", global_scale=torch.tensor([300.0], device=DEVICE)),
        Quantization("mxfp4", blocked_scales=True),
    ],
    ids=lambda q: f"{q.format}-{q.group_size}-{q.blocked_scales}",
)
def test_a_quantised_cache(impl, form, request):
    if impl == "triton":
        request.getfixturevalue("poisoned")
    q, k, v = heads(128, value_size=64)
    cos, sin = tables(TOKENS, 64)
    got = rope_hadamard(q, k, cos, sin, v=v, quantize=form, impl=impl)
    assert_close(got.q, transformed(embedded(q, cos, sin), 128))
    assert_codes(got.k, transformed(embedded(k, cos, sin), 128), form)
    assert_codes(got.v, v.double(), form)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_and_signs(impl, dtype):
    q, k, _ = heads(64)
    cos, sin = tables(50, 64, torch.float16)
    positions = torch.tensor([7, 49, 0, 7, 12], device=DEVICE, dtype=dtype)
    signs = torch.tensor([1, -1, -1, 1] * 8, device=DEVICE, dtype=torch.int8)
    got = rope_hadamard(
        q, k, cos, sin, positions=positions, signs=signs, block_size=32, scale=32**-0.5, impl=impl
    )
    for out, x in ((got.q, q), (got.k, k)):
        truth = transformed(embedded(x, cos[positions], sin[positions]), 32, signs)
        assert_close(out, truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rotated_products_are_products(impl):
    """What R3 is for: q'·k' = rope(q)·rope(k), here with more leading dimensions."""
    q, k = data(2, 3, 4, 128, dtype=torch.float32), data(2, 3, 4, 128, dtype=torch.float32, seed=1)
    cos, sin = tables(3, 128)
    got = rope_hadamard(q, k, cos, sin, impl=impl)
    products = (got.q.double() * got.k.double()).sum(-1)
    pairs = [[embedded(x, cos, sin) for x in both] for both in zip(q, k, strict=True)]
    want = torch.stack([(a * b).sum(-1) for a, b in pairs])
    assert torch.allclose(products, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_heads_before_tokens(impl):
    q, k, _ = heads(64)
    cos, sin = tables(TOKENS, 64)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    for a, b in zip(
        rope_hadamard(q, k, cos, sin, impl=impl)[:2],
        rope_hadamard(*turned, cos, sin, impl=impl)[:2],
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_more_vectors_than_the_kernel_counts(monkeypatch):
    from fastrot.kernels import gpu_rope_launch

    q, k, _ = heads(64)
    cos, sin = tables(TOKENS, 64)
    monkeypatch.setattr(gpu_rope_launch, "_rope_kernel", None)
    with pytest.raises(TypeError):  # so that no launch goes unnoticed
        rope_hadamard(q, k, cos, sin, impl="triton")
    monkeypatch.setattr(gpu_rope_launch, "MOST_VECTORS", TOKENS * HEADS + gpu_rope_launch.ROWS)
    got = rope_hadamard(q, k, cos, sin, impl="triton")
    assert_close(got.q, transformed(embedded(q, cos, sin), 64))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float64_is_exact(impl):
    q, k, _ = heads(64, torch.float64)
    cos, sin = tables(TOKENS, 64, torch.float64)
    got = rope_hadamard(q, k, cos, sin, impl=impl)
    truth = transformed(embedded(q, cos, sin), 64)
    torch.testing.assert_close(got.q, truth, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens(impl):
    q, k, v = (x[:0] for x in heads(64))
    got = rope_hadamard(q, k, *tables(0, 64), v=v, quantize="fp8", impl=impl)
    assert got.q.shape == q.shape
    assert got.k.codes.shape == k.shape
    assert got.v.scales.shape == (0, KV_HEADS, 1)


Q, K = torch.zeros(3, 4, 64), torch.zeros(3, 2, 64)
ANGLES = torch.zeros(3, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "got list"),
        ({"q": Q.int()}, TypeError, "got torch.int32"),
        ({"k": K.half()}, ValueError, "k is torch.float16"),
        ({"k": K[..., :32]}, ValueError, "k has head size 32, but q 64"),
        ({"v": K}, ValueError, "give a format in quantize"),
        ({"cos": ANGLES[:, :8]}, ValueError, "they must agree"),
        ({"block_size": 48}, ValueError, "does not divide the head size 64"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, ValueError, "positions is torch.int64"),
        ({"positions": torch.zeros(3)}, ValueError, "expected int64 or int32"),
        ({"positions": torch.zeros(3, dtype=torch.uint8)}, ValueError, "expected int64 or int32"),
        ({"positions": torch.tensor([0, 1, -1])}, ValueError, "positions are from -1 to 1, but"),
        ({"positions": torch.tensor([0, 1, 3])}, ValueError, "cos and sin have 3 rows"),
        ({"signs": torch.zeros(64)}, ValueError, r"signs\[0\] is 0.0, not ±1"),
        ({"k": None}, TypeError, "k is NoneType, expected a tensor"),
        ({"cos": torch.tensor(1.0)}, TypeError, "cos is a scalar, expected a tensor"),
        ({"cos": torch.ones(2, 32)}, ValueError, r"cos has shape \(2, 32\), whose leading dim"),
        ({"signs": torch.ones(3)}, ValueError, "signs has shape"),
        ({"quantize": "int3"}, ValueError, "format='int3'"),
        ({"impl": "gpu"}, ValueError, "impl='gpu'"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"q": Q, "k": K, "cos": ANGLES, "sin": ANGLES} | change
    with pytest.raises(error, match=message):
        rope_hadamard(**arguments)


@pytest.mark.parametrize("impl", ["cpu", *["triton"] * (TRITON and DEVICE == "cpu")])
def test_opcheck(impl):
    q, k = torch.randn(3, 4, 64), torch.randn(3, 2, 64)
    cos, sin = (t.cpu() for t in tables(9, 64))
    positions = torch.tensor([1, 2, 8])
    for arguments in (
        (q, k, None, cos[:3], sin[:3], None, None, None, False, 64, 0.125, None, None, False, impl),
        (q, k, k, cos, sin, positions, None, None, True, 32, 1.0, "mxfp4", None, True, impl),
    ):
        torch.library.opcheck(torch.ops.fastrot.rope_hadamard, arguments)
