"""``hadamard_transform`` under the transforms of torch: whatever they ask for, the dense matrix."""

import numpy as np
import pytest
import torch
from torch import func
from torch.autograd import forward_ad

import fastrot
from fastrot.hadamard import hadamard_matrix

SIGNS = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1, -1, 1, 1, -1], dtype=torch.int8)
H = torch.from_numpy(hadamard_matrix(12)).double()
DENSE = {False: 0.5 * SIGNS[:, None] * H, True: 0.5 * H.T * SIGNS}
"""Order 12 is not symmetric, so that a transpose too many shows."""


@pytest.fixture(params=[False, True], ids=["forth", "back"])
def pair(request):
    """The transform of order 12, and its oracle."""

    def transform(x):
        return fastrot.hadamard_transform(x, 0.5, signs=SIGNS, transpose=request.param)

    return transform, lambda x: x @ DENSE[request.param]


def total(function):
    return lambda x: function(x).sin().sum()


TRANSFORMS = {
    "grad": lambda f: func.grad(total(f)),
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](x.cos())[0],
    "vmap": func.vmap,
    "vmap of columns": lambda f: lambda x: func.vmap(f, in_dims=1)(x.T.contiguous()),
    "vmap of vmap": lambda f: lambda x: func.vmap(func.vmap(f))(torch.stack([x, -x])),
    "vmap of gradients": lambda f: func.vmap(func.grad(total(f))),
    "forward over reverse": lambda f: func.hessian(total(f)),
    "reverse over reverse": lambda f: func.jacrev(func.jacrev(total(f))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_transforms(pair, name):
    x = torch.randn(3, 12, dtype=torch.float64)
    got, expected = (TRANSFORMS[name](function)(x) for function in pair)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["grad", "jacfwd", "vmap"])
def test_functional_transforms_of_compiled_code(pair, name):
    torch.compiler.reset()
    x = torch.randn(3, 12, dtype=torch.float64)
    ours, oracle = (TRANSFORMS[name](function) for function in pair)
    torch.testing.assert_close(torch.compile(ours)(x), oracle(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangents(pair, requires_grad):
    transform, oracle = pair
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=requires_grad)
    t = torch.randn(3, 12, dtype=torch.float64)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(transform(forward_ad.make_dual(x, t)))
        torch.testing.assert_close(got.primal, oracle(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.tangent, oracle(t), rtol=1e-12, atol=1e-12)


def test_gradients_are_checked_by_torch(pair):
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(pair[0], x, **options)
    assert torch.autograd.gradgradcheck(pair[0], x, check_fwd_over_rev=True)


def test_signs_may_be_batched():
    x = torch.randn(3, 2, 12, dtype=torch.float64)
    signs = torch.stack([SIGNS, -SIGNS, SIGNS.flip(0)])

    def transform(x, signs):
        return fastrot.hadamard_transform(x, signs=signs)

    expected = (x * signs[:, None]) @ H
    torch.testing.assert_close(func.vmap(transform)(x, signs), expected)
    got = func.vmap(transform, in_dims=(None, 0))(x[0], signs)
    torch.testing.assert_close(got, (x[0] * signs[:, None]) @ H)


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("block_size", [None, 12])
def test_compiled_gradients(dynamic, block_size):
    def loss(x):
        return fastrot.hadamard_transform(x.sin(), 0.5, block_size=block_size).sin().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for size in (12, 24, 48):
        x = torch.randn(3, size, dtype=torch.float64, requires_grad=True)
        got, expected = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_export_with_a_size_of_its_own_choice():
    class Module(torch.nn.Module):
        def forward(self, x):
            return fastrot.hadamard_transform(x, 0.5)

    sizes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("size", min=2)}
    program = torch.export.export(Module(), (torch.randn(3, 24),), dynamic_shapes={"x": sizes})
    x = torch.randn(5, 48)
    torch.testing.assert_close(program.module()(x), Module()(x))
    with pytest.raises(ValueError, match="order 35"):
        program.module()(torch.randn(5, 35))


def learn_signs(learn):
    x = torch.randn(2, 12, dtype=torch.float64)
    return learn(lambda signs: fastrot.hadamard_transform(x, signs=signs).sum())


CONSTANTS = {
    "requires_grad": lambda f: f(SIGNS.double().requires_grad_()),
    "grad": lambda f: func.grad(f)(SIGNS.double()),
    "jvp": lambda f: func.jvp(f, (SIGNS.double(),), (SIGNS.double(),)),
}


@pytest.mark.parametrize("way", CONSTANTS)
def test_signs_are_constants(way):
    with pytest.raises(fastrot.RotationError, match="signs can't be differentiated"):
        learn_signs(CONSTANTS[way])
    with torch.no_grad():
        fastrot.hadamard_transform(torch.ones(12).double(), signs=SIGNS.double().requires_grad_())


REFUSALS = [
    (dict(signs=SIGNS.to("meta")), r"signs lies on meta and x on cpu; pass signs.to\(x.device\)"),
    (dict(signs=2 * SIGNS), r"signs\[0\] is 2, not ±1"),
    (dict(signs=SIGNS * torch.eye(12)[3].sub(1)), r"signs\[3\] is -?0.0, not ±1"),
    (dict(signs=SIGNS.float() / 0), r"signs\[0\] is inf, not ±1"),
    (dict(signs=SIGNS.bool()), "signs is torch.bool, expected real numbers"),
    (dict(signs=SIGNS.cfloat()), "signs is torch.complex64, expected real numbers"),
    (dict(scale=torch.tensor(0.5, requires_grad=True)), "scale is a tensor, expected a number"),
    (dict(scale="1"), "scale='1' is no number"),
    (dict(scale=None), "scale=None is no number"),
    (dict(scale=1j), "scale=1j is no number"),
    (dict(dim=1.0), "dim=1.0 is no whole number"),
    (dict(dim=None), "dim=None is no whole number"),
]


@pytest.mark.parametrize(("kwargs", "message"), REFUSALS)
def test_refusals(kwargs, message):
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.hadamard_transform(torch.ones(2, 12), **kwargs)


def test_numbers_of_numpy_and_sparse_tensors():
    x = torch.randn(2, 12)
    want = fastrot.hadamard_transform(x, 0.5, dim=1)
    assert torch.equal(fastrot.hadamard_transform(x, np.float32(0.5), dim=np.int64(1)), want)
    with pytest.raises(TypeError, match=r"takes dense tensors, got torch.sparse_coo; pass x.to_de"):
        fastrot.hadamard_transform(x.to_sparse())
