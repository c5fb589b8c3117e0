"""``hadamard_transform``: argument checks, the choice of an implementation, the torch operator."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
        signs: ``(block_size,)`` of ±1, the diagonal of ``D``; default the identity.
        transpose: compute ``scale · (x Hᵀ) D`` instead, the inverse if orthonormal. Hadamard
            matrices whose order is not a power of two are in general not symmetric.
        impl: ``"reference"`` (plain torch, any device), ``"cpu"`` (numba), ``"triton"`` (CUDA and
            ROCm tensors; CPU tensors under ``TRITON_INTERPRET=1``) or ``"auto"``: ``cpu`` for CPU
            tensors, ``triton`` for CUDA tensors, ``reference`` on any other device.

    Returns:
        A new tensor of the shape and dtype of ``x``. Differentiable; traced by ``torch.compile``
        and ``torch.export`` as one operator.

    Raises:
        ValueError: no Hadamard matrix of that size, a block size that does not divide, an unknown
            or impossible ``impl``.
        TypeError: ``x`` is not a tensor of one of the four dtypes.

    H is ordered naturally (Sylvester's) for powers of two; for ``m · 2^k`` see
    :func:`fastrot.hadamard.factors`.
    """
    if not isinstance(x, Tensor) or not -x.dim() <= dim < x.dim():
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"hadamard_transform needs a tensor with dimension {dim}, got {what}")
    dim %= x.dim()
    size = x.shape[dim] if block_size is None else block_size
    return torch.ops.fastrot.hadamard_transform(x, signs, scale, size, dim, transpose, impl)


def _check(x: Tensor, signs: Tensor | None, size: int, dim: int, impl: str) -> None:
    """Runs inside the operator, where no tracer follows it."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"hadamard_transform takes float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    factors(size)
    if x.shape[dim] % size:
        raise ValueError(f"block_size={size} does not divide dimension {dim} of {tuple(x.shape)}")
    if signs is not None and signs.shape != (size,):
        raise ValueError(f"signs has shape {tuple(signs.shape)}, expected ({size},)")
    _check_impl(impl, x.device)


def _check_impl(impl: str, device: torch.device) -> None:
    possible = {
        "auto": True,
        "reference": True,
        "cpu": device.type in ("cpu", "meta"),
        "triton": device.type in ("cuda", "cpu", "meta"),
    }
    if impl not in possible:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if not possible[impl]:
        usable = ", ".join(name for name in possible if possible[name])
        raise ValueError(f"impl={impl!r} cannot run on a {device.type} tensor; use {usable}")


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


@torch.library.custom_op("fastrot::hadamard_transform", mutates_args=())
def _hadamard_transform(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    _check(x, signs, size, dim, impl)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    source, target = x, out
    if dim == x.dim() - 1 and out.stride(-1) == 1:
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


@_hadamard_transform.register_fake
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, *ctx.arguments = inputs
    ctx.save_for_backward(signs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signs,) = ctx.saved_tensors
    scale, size, dim, transpose, impl = ctx.arguments
    back = torch.ops.fastrot.hadamard_transform(grad, signs, scale, size, dim, not transpose, impl)
    return back, None, None, None, None, None, None


_hadamard_transform.register_autograd(_backward, setup_context=_setup_context)
