"""Hadamard transforms in one operator with what surrounds them in a server.

Each function is one pass over its input: what comes before the transform (an activation times a
gate, RMSNorm), the transform, and the quantisation of its result. Nothing is rounded between; so
the codes are those of the exact result, but for ties that float32 arithmetic decides. float64
input makes every step float64 and is meant as the oracle of the others.

The operator is ``torch.ops.fastrot.fused_hadamard``: it has a fake implementation, so that
``torch.compile(fullgraph=True)`` and ``torch.export`` see one node, and allocates nothing but its
results, so that CUDA graphs capture it (after one eager call per size, which makes the tables of
sizes that are not a power of two). It has no gradient. Where a token does not fit one tile of the
Triton kernel, and on other devices, the same steps run one after the other.
"""

import functools
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional

from fastrot.errors import RotationError
from fastrot.hadamard import factors
from fastrot.kernels.arguments import DTYPES, check_impl, check_place, check_scale, check_signs
from fastrot.kernels.formats import (
    FORMATS,
    Quantization,
    Quantized,
    empty_result,
    round_result,
)
from fastrot.kernels.reference import compute_dtype
from fastrot.kernels.run import backend

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


def hadamard_quantize(
    x: Tensor,
    quantize: Quantization | str,
    *,
    scale: float | None = None,
    block_size: int | None = None,
    signs: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str = "auto",
) -> Quantized:
    """Quantise ``scale · (x Γ D) H``, the transform of the last dimension.

    Args:
        x: ``(…, n)``, float64, float32, bfloat16 or float16. Rows may have any stride.
        quantize: the format, by name or with its options.
        scale: factor of the transform; default ``block_size ** -0.5``, which is orthonormal.
        block_size: apply ``I ⊗ H`` with blocks of this size; default n.
        signs: ``(block_size,)`` of ±1, the diagonal of ``D``; default the identity.
        gamma: ``(n,)``, the diagonal of ``Γ``; default the identity.
        impl: as for :func:`fastrot.hadamard_transform`.

    Returns:
        Codes and scales, see :class:`fastrot.kernels.formats.Quantized`.

    Raises:
        RotationError: no Hadamard matrix of that size, a block or group that does not divide, an
            argument of the wrong shape, an unknown format or implementation.
        TypeError: ``x`` is not a tensor of one of the four dtypes.
    """
    form = quantization(quantize)
    if form is None:
        raise RotationError(
            f"quantize=None is not one of {', '.join(FORMATS)}; fastrot.hadamard_transform "
            "transforms without"
        )
    return _call(x, None, gamma, signs, form, None, None, block_size, scale, impl)


@overload
def glu_hadamard(
    gate: Tensor,
    up: Tensor,
    quantize: None = None,
    *,
    activation: str = ...,
    scale: float | None = ...,
    block_size: int | None = ...,
    signs: Tensor | None = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def glu_hadamard(
    gate: Tensor,
    up: Tensor,
    quantize: Quantization | str,
    *,
    activation: str = ...,
    scale: float | None = ...,
    block_size: int | None = ...,
    signs: Tensor | None = ...,
    impl: str = ...,
) -> Quantized: ...
def glu_hadamard(
    gate: Tensor,
    up: Tensor,
    quantize: Quantization | str | None = None,
    *,
    activation: str = "silu",
    scale: float | None = None,
    block_size: int | None = None,
    signs: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | Quantized:
    """Transform ``activation(gate) · up``, the input of the down projection: an MLP's R4.

    Args:
        gate: ``(…, n)``; for the output of a fused projection, ``gate, up = y.chunk(2, -1)`` costs
            nothing, since rows may have any stride.
        up: as ``gate``.
        quantize: the format of the result; default the dtype of ``gate``.
        activation: ``"silu"``, ``"gelu"`` (by the error function) or ``"gelu_tanh"``.
        scale: factor of the transform; default ``block_size ** -0.5``, which is orthonormal.
        block_size: apply ``I ⊗ H`` with blocks of this size; default n.
        signs: ``(block_size,)`` of ±1, the diagonal of ``D``; default the identity.
        impl: as for :func:`fastrot.hadamard_transform`.

    Returns:
        ``(…, n)``, or codes and scales if ``quantize`` is given.

    Raises:
        RotationError: as :func:`hadamard_quantize`, and for an unknown activation.
        TypeError: as :func:`hadamard_quantize`.
    """
    if activation not in _ACTIVATIONS:
        raise RotationError(f"activation={activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    if not isinstance(up, Tensor):
        raise TypeError(f"up is {type(up).__name__}, expected a tensor like gate")
    form = quantization(quantize)
    result = _call(gate, up, None, signs, form, activation, None, block_size, scale, impl)
    return result.codes if form is None else result


@overload
def rmsnorm_hadamard(
    x: Tensor,
    weight: Tensor | None = ...,
    quantize: None = None,
    *,
    eps: float = ...,
    scale: float | None = ...,
    block_size: int | None = ...,
    signs: Tensor | None = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def rmsnorm_hadamard(
    x: Tensor,
    weight: Tensor | None,
    quantize: Quantization | str,
    *,
    eps: float = ...,
    scale: float | None = ...,
    block_size: int | None = ...,
    signs: Tensor | None = ...,
    impl: str = ...,
) -> Quantized: ...
def rmsnorm_hadamard(
    x: Tensor,
    weight: Tensor | None = None,
    quantize: Quantization | str | None = None,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    block_size: int | None = None,
    signs: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | Quantized:
    """Transform ``x / sqrt(mean(x²) + eps) · weight``: a norm whose output is rotated in blocks.

    Args:
        x: ``(…, n)``.
        weight: ``(n,)``, for Gemma ``1 + weight``; default ones, as after folding it away.
        quantize: the format of the result; default the dtype of ``x``.
        eps: what the norm adds to the mean square (Zhang and Sennrich, "Root mean square layer
            normalization", 2019).
        scale: factor of the transform; default ``block_size ** -0.5``, which is orthonormal.
        block_size: apply ``I ⊗ H`` with blocks of this size; default n.
        signs: ``(block_size,)`` of ±1, the diagonal of ``D``; default the identity.
        impl: as for :func:`fastrot.hadamard_transform`.

    Returns:
        ``(…, n)``, or codes and scales if ``quantize`` is given.

    Raises:
        RotationError, TypeError: as :func:`hadamard_quantize`.
    """
    form = quantization(quantize)
    result = _call(x, None, weight, signs, form, None, eps, block_size, scale, impl)
    return result.codes if form is None else result


def quantization(quantize: Quantization | str | None) -> Quantization | None:
    """A format given by name, with its default options."""
    return Quantization(quantize) if isinstance(quantize, str) else quantize


def _call(
    x: Tensor,
    up: Tensor | None,
    gamma: Tensor | None,
    signs: Tensor | None,
    quantize: Quantization | None,
    activation: str | None,
    eps: float | None,
    block_size: int | None,
    scale: float | None,
    impl: str,
) -> Quantized:
    if not isinstance(x, Tensor) or x.dim() == 0:
        what = "a scalar" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"a fused transform needs a tensor of shape (…, n), got {what}")
    if scale is not None:
        check_scale(scale)
    block = x.shape[-1] if block_size is None else block_size
    codes, scales = torch.ops.fastrot.fused_hadamard(
        x,
        up,
        gamma,
        signs,
        None if quantize is None else quantize.global_scale,
        activation,
        eps,
        block,
        scale if scale is not None else max(block, 1) ** -0.5,
        None if quantize is None else quantize.format,
        None if quantize is None else quantize.group_size,
        quantize is not None and quantize.blocked_scales,
        impl,
    )
    return Quantized(codes, scales)


def _check(
    x: Tensor,
    up: Tensor | None,
    gamma: Tensor | None,
    signs: Tensor | None,
    quantize: Quantization | None,
    block: int,
    impl: str,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(
            f"a fused transform takes float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    factors(block)
    n = x.shape[-1]
    if n % block:
        raise RotationError(f"block_size={block} does not divide the last of {tuple(x.shape)}")
    if up is not None and (up.shape, up.dtype) != (x.shape, x.dtype):
        raise RotationError(
            f"up is {up.dtype} of shape {tuple(up.shape)}, but gate {x.dtype} of {tuple(x.shape)}"
        )
    if gamma is not None and gamma.shape != (n,):
        raise RotationError(f"gamma has shape {tuple(gamma.shape)}, expected ({n},)")
    if signs is not None:
        check_place(signs, block, x.device)
    world = None if quantize is None else quantize.global_scale
    named = {"up": up, "gamma": gamma, "global_scale": world}
    for name, value in named.items():
        if value is not None and value.device != x.device:
            raise RotationError(f"{name} is on {value.device}, but the data on {x.device}")
    if quantize is not None:
        quantize.check(n)
    check_impl(impl, x.device)


@torch.library.custom_op("fastrot::fused_hadamard", mutates_args=())
def _fused_hadamard(
    x: Tensor,
    up: Tensor | None,
    gamma: Tensor | None,
    signs: Tensor | None,
    global_scale: Tensor | None,
    activation: str | None,
    eps: float | None,
    block: int,
    scale: float,
    format: str | None,
    group_size: int | None,
    blocked_scales: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    quantize = Quantization(format, group_size, global_scale, blocked_scales) if format else None
    _check(x, up, gamma, signs, quantize, block, impl)
    if signs is not None and signs.is_cpu:
        check_signs(signs)
    if x.numel() and on_triton(impl, x.device):
        from fastrot.kernels.gpu_fused_launch import transform

        out = empty_result(x, quantize)
        if transform(x, up, gamma, signs, out, block, scale, activation, eps, quantize):
            return out
    z = x.to(compute_dtype(x.dtype))
    if activation is not None and up is not None:
        z = _ACTIVATIONS[activation](z) * up.to(z.dtype)
    if eps is not None:
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    if gamma is not None:
        z = z * gamma.to(z.dtype)
    return round_result(transformed(z, signs, block, scale, impl), x.dtype, quantize)


def on_triton(impl: str, device: torch.device) -> bool:
    """Whether ``impl`` chooses a Triton kernel for data on ``device``."""
    return impl == "triton" or (impl == "auto" and device.type == "cuda")


def transformed(z: Tensor, signs: Tensor | None, block: int, scale: float, impl: str) -> Tensor:
    """``scale · (z D) (I ⊗ H)`` in the dtype of z, contiguous."""
    source = z.contiguous()
    y = torch.empty_like(source)
    if y.numel():
        view = source.view(-1, block, 1)
        backend(impl, z.device)(view, y.view(view.shape), signs, scale, False)
    return y


@_fused_hadamard.register_fake
def _(
    x: Tensor,
    up: Tensor | None,
    gamma: Tensor | None,
    signs: Tensor | None,
    global_scale: Tensor | None,
    activation: str | None,
    eps: float | None,
    block: int,
    scale: float,
    format: str | None,
    group_size: int | None,
    blocked_scales: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    quantize = Quantization(format, group_size, global_scale, blocked_scales) if format else None
    _check(x, up, gamma, signs, quantize, block, impl)
    return empty_result(x, quantize)
