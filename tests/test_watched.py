"""A call that nobody looks at goes straight to the kernel; anyone who looks sees the operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrot
from fastrot.kernels.watched import is_plain

SIZE = 12
OPERATOR = torch.ops.fastrot.hadamard_transform.default


class Functions(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """Notes what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Torch asks it first."""


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_operator(mode: Callable[[], Any]):
    with mode() as looking:
        fastrot.hadamard_transform(torch.randn(2, SIZE))
    assert OPERATOR in looking.seen


def test_plain_tensors():
    x = torch.randn(2, SIZE)
    assert is_plain(x)
    assert is_plain(x.to(torch.int8))
    with torch.no_grad(), torch.autocast("cpu"):
        assert is_plain(x)
    with torch.inference_mode():
        assert is_plain(x)
        assert is_plain(torch.randn(2, SIZE))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.requires_grad_(),
        nn.Parameter,
        lambda x: nn.Parameter(x, requires_grad=False),
        lambda x: x.as_subclass(Subclass),
        torch._neg_view,
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
    ],
)
def test_others_are_not(make: Callable[[Tensor], Tensor]):
    assert not is_plain(make(torch.randn(2, SIZE)))


def test_signs_that_require_gradients_are_refused_as_ever():
    signs = torch.ones(SIZE, requires_grad=True)
    with pytest.raises(fastrot.RotationError, match="signs can't be differentiated"):
        fastrot.hadamard_transform(torch.randn(2, SIZE), signs=signs)


def test_tracers_record_the_operator():
    x = torch.randn(2, SIZE)
    traced = torch.jit.trace(lambda x: fastrot.hadamard_transform(x), x)
    assert "fastrot::hadamard_transform" in str(traced.graph)
    exported = torch.export.export(Transform(), (x,))
    assert any(node.target is OPERATOR for node in exported.graph.nodes)


class Transform(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        return fastrot.hadamard_transform(x)
