"""``hadamard_transform`` as a torch operator: tracing, gradients, layouts, refusals."""

import pytest
import torch
from oracles import transformed

import fastrot

CPU_IMPLS = ("reference", "cpu")
SIZES = (1, 2, 12, 28, 64, 80, 96, 896)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_integers_are_exact(impl, size, transpose):
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-4, 5, (3, 2 * size), generator=generator).float()
    signs = torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1).to(torch.int8)
    got = fastrot.hadamard_transform(
        x, block_size=size, signs=signs, transpose=transpose, impl=impl
    )
    assert torch.equal(got.double(), transformed(x, size, signs, scale=1, transpose=transpose))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_every_dimension(impl, dim):
    x = torch.randn(12, 24, 8, dtype=torch.float64)
    size = {0: 12, 1: 12, 2: 8, -1: 8, -2: 12}[dim]
    got = fastrot.hadamard_transform(x, 0.5, dim=dim, block_size=size, impl=impl)
    expected = transformed(x, size, scale=0.5, dim=dim)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., :12],
        lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda x: x[:1].expand(5, -1, -1),
    ],
    ids=["transposed", "every second row", "row slices", "strided vectors", "expanded"],
)
def test_layouts(view):
    x = view(torch.randn(3, 4, 28, dtype=torch.float64))
    size = 28 if x.shape[-1] == 28 else 12
    got = fastrot.hadamard_transform(x, block_size=size)
    torch.testing.assert_close(got, transformed(x, size, scale=1), rtol=1e-12, atol=1e-12)
    assert got.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (16,), (2, 3, 4, 16)])
def test_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64)
    got = fastrot.hadamard_transform(x)
    torch.testing.assert_close(got, transformed(x, 16, scale=1), rtol=1e-12, atol=1e-12)


def test_input_is_left_alone():
    x = torch.randn(4, 64)
    before = x.clone()
    fastrot.hadamard_transform(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("signs", [None, torch.tensor([1, -1] * 6, dtype=torch.int8)])
@pytest.mark.parametrize("transpose", [False, True])
def test_gradient_is_the_transpose(signs, transpose):
    """Order 12 is not symmetric, so a gradient by H itself would be wrong."""
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    options = {"block_size": 12, "signs": signs, "transpose": transpose}
    assert torch.autograd.gradcheck(lambda v: fastrot.hadamard_transform(v, 0.3, **options), x)
    assert torch.autograd.gradgradcheck(lambda v: fastrot.hadamard_transform(v, 0.3, **options), x)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_opcheck(impl):
    signs = torch.ones(12)
    x = torch.randn(3, 24, requires_grad=True)
    for dim, given in ((1, None), (1, signs)):
        torch.library.opcheck(
            torch.ops.fastrot.hadamard_transform.default, (x, given, 0.5, 12, dim, False, impl)
        )
    y = torch.randn(24, 3, 5).transpose(1, 2)
    torch.library.opcheck(
        torch.ops.fastrot.hadamard_transform.default, (y, None, 1.0, 12, 0, True, impl)
    )


def test_compile_and_export_see_one_operator():
    class Module(torch.nn.Module):
        def forward(self, x):
            return fastrot.hadamard_transform(x.sin(), 0.25, block_size=28).cos()

    x = torch.randn(3, 56)
    expected = Module()(x)
    torch.testing.assert_close(torch.compile(Module(), fullgraph=True)(x), expected)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: rows}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fastrot.hadamard_transform.default") == 1
    more = torch.randn(7, 56)
    torch.testing.assert_close(program.module()(more), Module()(more))


REFUSALS = [
    (dict(impl="cuda"), "is not one of auto, reference, cpu, triton"),
    (dict(block_size=5), "no Hadamard matrix of order 5"),
    (dict(block_size=32), "block_size=32 does not divide"),
    (dict(dim=2), "needs a tensor with dimension 2"),
    (dict(signs=torch.ones(3)), r"signs has shape \(3,\), expected \(48,\)"),
]


@pytest.mark.parametrize(("kwargs", "message"), REFUSALS)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fastrot.hadamard_transform(torch.ones(2, 48), **kwargs)


@pytest.mark.parametrize("x", [torch.ones(4, dtype=torch.int32), torch.ones(4, dtype=torch.cfloat)])
def test_wrong_dtypes_are_refused(x):
    with pytest.raises(TypeError, match="takes float64, float32, bfloat16 or float16"):
        fastrot.hadamard_transform(x)


LIKE = {"itself": lambda x: x, "fresh": torch.empty_like, "strided": lambda x: x.mT.clone().mT}


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("dim", [-1, 0])
def test_out(impl, name, dim):
    for x in (torch.randn(12, 24), torch.randn(24, 12).mT, torch.randn(24, 48)[::2, ::4].T):
        options = dict(dim=dim, block_size=12, impl=impl)
        expected = fastrot.hadamard_transform(x, **options)
        out = LIKE[name](x)
        version = out._version
        assert fastrot.hadamard_transform(x, **options, out=out) is out
        assert torch.equal(out, expected)
        assert out._version > version


@pytest.mark.parametrize("itself", [True, False])
def test_out_compiles(itself):
    def function(x, out):
        y = x + 1
        out = y if itself else out
        fastrot.hadamard_transform(y, 0.5, out=out)
        return out * 2

    x, out = torch.randn(2, 3, 12), torch.zeros(3, 12)
    expected = 2 * fastrot.hadamard_transform(x[0] + 1, 0.5)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x[0], out), expected)
    assert itself or torch.equal(2 * out, expected)


@pytest.mark.parametrize("step", [1, 12, 48])
def test_out_that_shares_memory(step):
    memory = torch.randn(24 * 12, dtype=torch.float64)
    x, out = memory[: 20 * 12].view(20, 12), memory[step:][: 20 * 12].view(20, 12)
    expected = fastrot.hadamard_transform(x)
    fastrot.hadamard_transform(x, out=out)
    assert torch.equal(out, expected)


def test_opcheck_of_out():
    x, signs = torch.randn(3, 24), torch.ones(12)
    for out in (torch.empty_like(x), torch.empty(24, 3).mT):
        torch.library.opcheck(
            torch.ops.fastrot.hadamard_transform_into.default,
            (x, signs, 0.5, 12, 1, False, "cpu", out),
        )


X = torch.zeros(4, 12)
WRONG_OUTS = [
    (X[:2], r"out has shape \(2, 12\) and x \(4, 12\)"),
    (X.double(), r"out has dtype torch.float64 and x torch.float32"),
    (X.to("meta"), r"out has device meta and x cpu"),
    (X[0].expand(4, 12), r"out has more than one element in one place"),
    (torch.zeros(4, 12, requires_grad=True), r"out= can't be differentiated"),
]


@pytest.mark.parametrize(("out", "message"), WRONG_OUTS)
def test_a_wrong_out_is_refused(out, message):
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.hadamard_transform(X.clone() if out.requires_grad else X, out=out)


def test_out_while_something_differentiates_is_refused():
    x = torch.randn(4, 12, requires_grad=True)
    out = torch.zeros(4, 12)
    with pytest.raises(fastrot.RotationError, match=r"call under torch.no_grad\(\)"):
        fastrot.hadamard_transform(x, out=out)
    with pytest.raises(fastrot.RotationError, match="leave it out"):
        torch.func.vmap(lambda v: fastrot.hadamard_transform(v, out=v))(x.detach())
    assert not out.any()
    with torch.no_grad():
        fastrot.hadamard_transform(x, out=out)
        fastrot.hadamard_transform(x, out=x)
    assert torch.equal(x, out)
    with torch.inference_mode():
        y = torch.ones(4, 12)
        fastrot.hadamard_transform(y, out=y)
    assert torch.equal(y, fastrot.hadamard_transform(torch.ones(4, 12)))


def test_an_operator_called_directly_is_differentiable():
    x = torch.randn(2, 12, requires_grad=True)
    y = torch.ops.fastrot.hadamard_transform(x, None, 1.0, 12, 1, False, "auto")
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        grad.double(), transformed(torch.ones(2, 12), 12, scale=1, transpose=True)
    )


def test_a_negated_view_is_no_plain_tensor():
    """Its memory holds the opposite."""
    x = torch.randn(2, 12, dtype=torch.float64)
    got = fastrot.hadamard_transform(torch._neg_view(x))
    torch.testing.assert_close(got, transformed(-x, 12, scale=1))
