"""``hadamard_transform``: argument checks, the choice of an implementation, the torch operator."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastrot.errors import RotationError
from fastrot.hadamard import factors

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
"""Values of ``impl``; ``auto`` follows the device."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Transform = Callable[[Tensor, Tensor, Tensor | None, float, bool], None]


def hadamard_transform(
    x: Tensor,
    scale: float = 1.0,
    *,
    dim: int = -1,
    block_size: int | None = None,
    signs: Tensor | None = None,
    transpose: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Multiply the vectors along one dimension by a Hadamard matrix: ``scale · (x D) H``.

    Args:
        x: any shape, float64, float32, bfloat16 or float16. Intermediates are float64 for float64
            and float32 otherwise; the result is rounded once to the dtype of ``x``.
        scale: factor of the result; ``block_size ** -0.5`` makes the transform orthonormal.
        dim: the dimension along which the vectors lie.
        block_size: apply ``I ⊗ H`` with blocks of this size; default the whole dimension.
        signs: ``(block_size,)`` of ±1 on the device of ``x``, the diagonal of ``D``; default the
            identity. On the CPU other values are refused; on a GPU, where looking would wait for
            the device, they are the caller's word.
        transpose: compute ``scale · (x Hᵀ) D`` instead, the inverse if orthonormal. Hadamard
            matrices whose order is not a power of two are in general not symmetric.
        impl: ``"reference"`` (plain torch, any device), ``"cpu"`` (numba), ``"triton"`` (CUDA and
            ROCm tensors; CPU tensors under ``TRITON_INTERPRET=1``) or ``"auto"``: ``cpu`` for CPU
            tensors, ``triton`` for CUDA tensors, ``reference`` on any other device.

    Returns:
        A new tensor of the shape and dtype of ``x``. Differentiable in ``x``, forwards and
        backwards and under the transforms of ``torch.func``; traced by ``torch.compile`` and
        ``torch.export`` as one operator.

    Raises:
        RotationError: no Hadamard matrix of that size, a block size that does not divide, an
            unknown or impossible ``impl``; signs that are not ±1, lie elsewhere or require
            gradients; a scale that is no number.
        TypeError: ``x`` is not a tensor of one of the four dtypes.

    H is ordered naturally (Sylvester's) for powers of two; for ``m · 2^k`` see
    :func:`fastrot.hadamard.factors`.
    """
    if not isinstance(x, Tensor) or not -x.dim() <= dim < x.dim():
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise RotationError(f"hadamard_transform needs a tensor with dimension {dim}, got {what}")
    if isinstance(scale, Tensor):
        raise RotationError(
            "scale is a tensor, expected a number; pass float(scale), or multiply the result by it "
            "if it is learned"
        )
    dim %= x.dim()
    size = x.shape[dim] if block_size is None else block_size
    return _call(x, signs, scale, size, dim, transpose, impl)


def _call(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    if _is_transformed(x, signs):
        return _transformed(x, signs, scale, size, dim, transpose, impl)
    return _operator(x, signs, scale, size, dim, transpose, impl)


def _is_transformed(x: Tensor, signs: Tensor | None) -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks on.

    What is registered with an operator serves neither, an ``autograd.Function`` both.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    tangent = unpack_dual(x).tangent
    return tangent is not None or (signs is not None and unpack_dual(signs).tangent is not None)


def _check(x: Tensor, signs: Tensor | None, size: int, dim: int, impl: str) -> None:
    """Runs inside the operator, where no tracer follows it."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"hadamard_transform takes float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    if isinstance(size, int):  # a tracer's symbol is asked when it has a value
        factors(size)
    if x.shape[dim] % size:
        raise RotationError(
            f"block_size={size} does not divide dimension {dim} of {tuple(x.shape)}"
        )
    if signs is not None and signs.shape != (size,):
        raise RotationError(f"signs has shape {tuple(signs.shape)}, expected ({size},)")
    if signs is not None and signs.device != x.device:
        raise RotationError(
            f"signs lies on {signs.device} and x on {x.device}; pass signs.to(x.device)"
        )
    _check_impl(impl, x.device)


def _check_signs(signs: Tensor) -> None:
    wrong = (signs.abs() != 1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise RotationError(
            f"signs[{first}] is {signs[first].item()}, not ±1; multiply x by that diagonal yourself"
        )


def _check_impl(impl: str, device: torch.device) -> None:
    possible = {
        "auto": True,
        "reference": True,
        "cpu": device.type in ("cpu", "meta"),
        "triton": device.type in ("cuda", "cpu", "meta"),
    }
    if impl not in possible:
        raise RotationError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if not possible[impl]:
        usable = ", ".join(name for name in possible if possible[name])
        raise RotationError(f"impl={impl!r} cannot run on a {device.type} tensor; use {usable}")


def _backend(impl: str, device: torch.device) -> Transform:
    if impl == "auto":
        impl = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if impl == "cpu":
        from fastrot.kernels.cpu import transform
    elif impl == "triton":
        from fastrot.kernels.gpu import transform
    else:
        from fastrot.kernels.reference import transform
    return transform


NAME = "fastrot::hadamard_transform"

torch.library.define(
    NAME,
    "(Tensor x, Tensor? signs, float scale, SymInt size, int dim, bool transpose, str impl)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.fastrot.hadamard_transform.default


def _run(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    _check(x, signs, size, dim, impl)
    if signs is not None and signs.device.type == "cpu":
        _check_signs(signs)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    source, target = x, out
    if dim == x.dim() - 1 and out.stride(-1) == 1 and not x.is_contiguous():
        # The leading dimensions only enumerate vectors: take them in memory order.
        order = sorted(range(dim), key=out.stride, reverse=True)
        source, target = x.permute(*order, dim), out.permute(*order, dim)
    source = source.contiguous()
    result = target if target.is_contiguous() else torch.empty_like(source)
    shape = (-1, size, math.prod(source.shape[dim + 1 :]))
    transform = _backend(impl, x.device)
    transform(source.view(shape), result.view(shape), signs, scale, transpose)
    if result is not target:
        target.copy_(result)
    return out


torch.library.impl(NAME, "default", _run)


@torch.library.register_fake(NAME)
def _(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    _check(x, signs, size, dim, impl)
    return torch.empty_like(x)


class _Transform(torch.autograd.Function):
    """The operator once more, with all that ``torch.func`` asks for; it is linear in ``x``."""

    @staticmethod
    def forward(
        x: Tensor,
        signs: Tensor | None,
        scale: float,
        size: int,
        dim: int,
        transpose: bool,
        impl: str,
    ) -> Tensor:
        return _operator(x, signs, scale, size, dim, transpose, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, signs, *ctx.arguments = inputs
        if ctx.needs_input_grad[1]:
            raise RotationError(LEARNED_SIGNS)
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (signs,) = ctx.saved_tensors
        scale, size, dim, transpose, impl = ctx.arguments
        back = _call(grad, signs, scale, size, dim, not transpose, impl)
        return back, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, signs_tangent: Tensor | None, *_: None) -> Tensor:
        if signs_tangent is not None:
            raise RotationError(LEARNED_SIGNS)
        return _call(tangent, *ctx.saved_tensors, *ctx.arguments)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        signs: Tensor | None,
        scale: float,
        size: int,
        dim: int,
        transpose: bool,
        impl: str,
    ) -> tuple[Tensor, int]:
        of_x, of_signs, *_ = in_dims
        batch = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
        if signs is None or of_signs is None:
            return _call(batch, signs, scale, size, dim + 1, transpose, impl), 0
        pairs = zip(batch, signs.movedim(of_signs, 0), strict=True)
        each = [_call(v, d, scale, size, dim, transpose, impl) for v, d in pairs]
        return torch.stack(each), 0


# torch.compiler.disable would import the whole compiler; this does when it is called.
@torch._disable_dynamo
def _transformed(*arguments: Any) -> Tensor:
    """A compiler would trace the function down to the operator, which has no forward mode."""
    return _Transform.apply(*arguments)


LEARNED_SIGNS = (
    "signs can't be differentiated, they are constants of ±1; detach them, or multiply x by a "
    "learned diagonal yourself"
)

torch.library.register_autograd(NAME, _Transform.backward, setup_context=_Transform.setup_context)
torch.library.register_vmap(NAME, _Transform.vmap)
