"""Transforms fused with activations, norms and quantisation, against float64."""

import os

import pytest
import torch
from codes import assert_codes, poisoned  # noqa: F401
from oracles import transformed
from torch import Tensor
from torch.nn import functional

from fastrot.kernels.formats import FORMATS, Quantization
from fastrot.kernels.fused import glu_hadamard, hadamard_quantize, rmsnorm_hadamard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["reference", *["cpu"] * (DEVICE == "cpu"), *["triton"] * TRITON]
HALF = {torch.bfloat16: 1.1, torch.float16: 1.1}
"""Admissible RMS error, in errors of correct rounding."""
EPS = 1e-5

# A tile of one token and of many, of columns alone, of factors that need a table, with padding.
SHAPES = [
    (5, 768, 768),
    (70, 128, 128),
    (3, 1024, 16),
    (3, 2048, 128),
    (2, 4096, 4096),
    (1, 11008, 11008),
    (1, 14336, 14336),
    (3, 28672, 128),
    (2, 1280, 20),
]


def data(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x[..., 3] *= 30  # an outlier, as there are
    return x.to(DEVICE, dtype)


def assert_close(out: Tensor, truth: Tensor) -> None:
    """Within a tenth of correct rounding for 16 bits, a few ulp of a token for float32."""
    error = out.double() - truth
    assert error.isfinite().all()
    if out.dtype in HALF:
        rounding = (truth.to(out.dtype).double() - truth).square().mean().sqrt()
        assert error.square().mean().sqrt() <= HALF[out.dtype] * rounding
    else:
        ulps = 8 * torch.finfo(out.dtype).eps  # of the activation and of the transform
        assert (error.norm(dim=-1) <= ulps * truth.norm(dim=-1)).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "n", "block"), SHAPES)
def test_codes(impl, format, tokens, n, block, request):
    if impl == "triton":
        request.getfixturevalue("poisoned")
    elif tokens * n > 10000:
        pytest.skip("the size is of interest to tiles only")
    x, q = data(tokens, n), Quantization(format)
    got = hadamard_quantize(x, q, block_size=block, impl=impl)
    assert_codes(got, transformed(x.double(), block), q)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "q",
    [
        Quantization("int4", 128),
        Quantization("fp8", 32),
        Quantization("int8", 48),
        Quantization("mxfp4", blocked_scales=True),
        Quantization("nvfp4", blocked_scales=True),
        Quantization("nvfp4", global_scale=torch.tensor([300.0], device=DEVICE)),
    ],
    ids=lambda q: f"{q.format}-{q.group_size}-{q.blocked_scales}",
)
@pytest.mark.parametrize(("tokens", "n", "block"), [(5, 768, 768), (131, 384, 128)])
def test_options_of_formats(impl, q, tokens, n, block):
    x = data(tokens, n)
    assert_codes(
        hadamard_quantize(x, q, block_size=block, impl=impl), transformed(x.double(), block), q
    )


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n", "block"), [(768, 768), (2048, 128)])
def test_activations(impl, dtype, activation, n, block):
    gate, up = data(2, 3, 2 * n, dtype=dtype).chunk(2, -1)  # rows with a stride
    gate = gate * 2
    gate, up = torch.cat((gate, up), -1).chunk(2, -1)
    z = ACTIVATIONS[activation](gate.double()) * up.double()
    out = glu_hadamard(gate, up, activation=activation, block_size=block, impl=impl)
    assert out.dtype == dtype
    assert_close(out, transformed(z, block))
    quantised = glu_hadamard(gate, up, "fp8", activation=activation, block_size=block, impl=impl)
    assert_codes(quantised, transformed(z, block), Quantization("fp8"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "n", "block"), [(5, 768, 128), (66, 64, 64), (2, 11008, 11008)])
def test_rmsnorm(impl, dtype, weighted, tokens, n, block):
    x = data(tokens, n, dtype=dtype)
    weight = torch.rand(n, device=DEVICE) + 0.5 if weighted else None
    z = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    truth = transformed(z if weight is None else z * weight.double(), block)
    out = rmsnorm_hadamard(x, weight, eps=EPS, block_size=block, impl=impl)
    assert_close(out, truth)
    quantised = rmsnorm_hadamard(x, weight, "int8", eps=EPS, block_size=block, impl=impl)
    assert_codes(quantised, truth, Quantization("int8"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gamma_signs_and_scale(impl):
    x, gamma = data(3, 512), torch.rand(512, device=DEVICE)
    signs = torch.tensor([1, -1, -1, 1] * 16, dtype=torch.int8, device=DEVICE)
    got = hadamard_quantize(
        x, "int8", block_size=64, gamma=gamma, signs=signs, scale=0.3, impl=impl
    )
    truth = transformed(x.double() * gamma.double(), 64, signs) * 0.3 * 8
    assert_codes(got, truth, Quantization("int8"))
    with pytest.raises(AssertionError):
        assert_codes(got, transformed(x.double() * gamma.double(), 64) * 2.4, Quantization("int8"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["int8", "fp8", "int4", "mxfp4", "nvfp4"])
def test_ties_of_exact_values_go_to_even(impl, format):
    """Without arithmetic to blame: blocks of one, scales that are powers of two."""
    largest = FORMATS[format].largest
    steps = {"int8": 0.5, "fp8": 1.0, "int4": 0.5, "mxfp4": 0.25, "nvfp4": 0.25}[format]
    values = torch.arange(0, largest, steps)[: 1 << 10]
    values = torch.cat((values, -values)) + 0.0  # a sum has no negative zero
    group = FORMATS[format].group or 32
    rows = values[: len(values) // (group - 1) * (group - 1)].view(-1, group - 1)
    x = torch.cat((rows, torch.full((len(rows), 1), largest)), -1).to(DEVICE, torch.float16)
    q = Quantization(format)
    got = hadamard_quantize(x, q, block_size=1, impl=impl)
    want = q.quantize(x.double())
    assert torch.equal(got.scales.float(), want.scales.float())
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))


@pytest.mark.skipif(not TRITON, reason="no Triton")
@pytest.mark.parametrize("n", [8960, 20 * 1024])
def test_sizes_without_a_tile(n):
    x, q = data(2, n), Quantization("mxfp4")
    assert_codes(hadamard_quantize(x, q, impl="triton"), transformed(x.double(), n), q)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_special_rows(impl):
    """Zeros, the smallest and the largest values; no scale is zero or infinite but for mxfp4."""
    x = torch.zeros(4, 64, dtype=torch.float32, device=DEVICE)
    x[1], x[2, 5], x[3] = 1e-38, 1e30, data(64, dtype=torch.float32)
    for format in FORMATS:
        q = Quantization(format)
        back = q.dequantize(hadamard_quantize(x, q, block_size=1, impl=impl))
        assert back.isfinite().all()
        assert not back[0].any()
        assert_codes(hadamard_quantize(x[3:], q, block_size=1, impl=impl), x[3:].double(), q)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_no_tokens(impl, format):
    x = torch.empty(2, 0, 128, device=DEVICE)
    result = glu_hadamard(x, x, format, impl=impl)
    assert (result if format is None else result.codes).shape[:2] == (2, 0)


@pytest.mark.skipif(not TRITON, reason="no Triton")
def test_any_layout():
    wide = data(6, 4, 300)
    views = [wide[::2, 1:, 17:145], wide.transpose(0, 1)[..., :128], wide[0, 0, :128], wide[:, :0]]
    views.append(wide.mT[:, :128])
    q = Quantization("mxfp4")
    for x in views[:3]:
        got = hadamard_quantize(x, q, impl="triton")
        assert_codes(got, transformed(x.double(), 128), q)
        assert got.codes.shape == (*x.shape[:-1], 64)
        assert got.scales.shape == (*x.shape[:-1], 4)
    assert hadamard_quantize(wide[:, :0, :128], q, impl="triton").codes.shape == (6, 0, 64)
    strided = wide.permute(0, 2, 1)[:, :, :4]
    got = hadamard_quantize(strided, "int4", impl="triton")
    assert_codes(got, transformed(strided.double(), 4), Quantization("int4"))


X = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hadamard_quantize(X, "int3"), ValueError, "format='int3' is not one of"),
        (lambda: hadamard_quantize(X, "int8", block_size=48), ValueError, "block_size=48 does not"),
        (lambda: hadamard_quantize(X[:, :48], "mxfp4"), ValueError, "48 elements do not divide"),
        (
            lambda: hadamard_quantize(X, "int8", gamma=X[0, :3]),
            ValueError,
            r"gamma has shape \(3,\)",
        ),
        (lambda: hadamard_quantize(X, "int8", signs=X), ValueError, "signs has shape"),
        (lambda: hadamard_quantize(X, "int8", signs=X[0]), ValueError, r"signs\[0\] is 0.0, not"),
        (lambda: hadamard_quantize(X, "int8", scale="1"), ValueError, "scale='1' is no number"),
        (lambda: hadamard_quantize(X, None), ValueError, "quantize=None is not one of int8"),
        (lambda: glu_hadamard(X, None), TypeError, "up is NoneType"),
        (lambda: hadamard_quantize(X.int(), "int8"), TypeError, "got torch.int32"),
        (lambda: hadamard_quantize([1.0], "int8"), TypeError, "got list"),
        (lambda: hadamard_quantize(X[0, 0], "int8"), TypeError, "a scalar"),
        (lambda: hadamard_quantize(X, "int8", impl="gpu"), ValueError, "impl='gpu'"),
        (lambda: glu_hadamard(X, X[:1]), ValueError, r"up is torch.float32 of shape \(1, 64\)"),
        (lambda: glu_hadamard(X, X.half()), ValueError, "up is torch.float16"),
        (lambda: glu_hadamard(X, X, activation="relu"), ValueError, "activation='relu'"),
        (
            lambda: rmsnorm_hadamard(X, torch.ones(64, device="meta")),
            ValueError,
            "gamma is on meta, but the data on cpu",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="opcheck wants what is on a GPU to be there only")
@pytest.mark.parametrize("impl", ["cpu", *["triton"] * TRITON])
def test_opcheck(impl):
    x, gamma = torch.randn(3, 64), torch.rand(64)
    world = torch.tensor([2.0])
    for arguments in (
        (x, None, gamma, None, None, None, None, 64, 0.125, "mxfp4", None, True, impl),
        (x, None, None, gamma[:32].sign(), world, None, 1e-6, 32, 1.0, "nvfp4", None, False, impl),
        (x, x + 1, None, None, None, "silu", None, 64, 0.125, None, None, False, impl),
    ):
        torch.library.opcheck(torch.ops.fastrot.fused_hadamard, arguments)


def test_compile_and_export_see_one_operator():
    class MLP(torch.nn.Module):
        def forward(self, x):
            gate, up = x.chunk(2, -1)
            codes, scales = glu_hadamard(gate, up, "fp8", block_size=64)
            return codes.float() * scales

    x = torch.randn(3, 256)
    want = MLP()(x)
    compiled = torch.compile(MLP(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), want)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(MLP(), (x,), dynamic_shapes=({0: rows},))
    calls = [n for n in program.graph.nodes if "fastrot" in str(n.target)]
    assert len(calls) == 1
    assert torch.equal(program.module()(torch.cat((x, x))), torch.cat((want, want)))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph():
    x, up = data(1, 14336), data(1, 14336, seed=1)
    want = glu_hadamard(x, up, "fp8")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scales = glu_hadamard(x, up, "fp8")
    x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(scales, want.scales)


@pytest.mark.skipif(not TRITON, reason="no Triton")
@pytest.mark.parametrize("n", [11008, 14336, 5760])
@pytest.mark.parametrize("signed", [False, True])
def test_tokens_in_pieces(n, signed, request):
    """Of factors of which one or both have a table, with all that can stand before them."""
    request.getfixturevalue("poisoned")
    x, up, gamma = data(3, n), data(3, n, seed=1), torch.rand(n, device=DEVICE) + 0.5
    signs = data(n).sign().to(torch.int8) if signed else None
    norm = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    glu = transformed(functional.silu(x.double()) * up.double(), n, signs)
    normed = transformed(x.double() * norm * gamma.double(), n, signs)
    # One scale for a token, for a part of a piece, and, where rows allow it, for two pieces.
    others = {11008: ["mxfp4"], 14336: ["mxfp4", "int4"], 5760: ["nvfp4"]}[n]
    for q in map(Quantization, ("fp8", *others), (None, None, 128)):
        got = hadamard_quantize(x, q, gamma=gamma, signs=signs, impl="triton")
        assert_codes(got, transformed(x.double() * gamma.double(), n, signs), q)
        assert_codes(glu_hadamard(x, up, q, signs=signs, impl="triton"), glu, q)
        for weight, truth in ((gamma, normed), (None, transformed(x.double() * norm, n, signs))):
            got = rmsnorm_hadamard(x, weight, q, eps=EPS, signs=signs, impl="triton")
            assert_codes(got, truth, q)
    assert_close(glu_hadamard(x, up, signs=signs, impl="triton"), glu)
    assert_close(rmsnorm_hadamard(x, gamma, eps=EPS, signs=signs, impl="triton"), normed)
