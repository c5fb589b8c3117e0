"""A transform of tensors of any layout, by the implementation that was asked for."""

import math
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastrot.kernels.arguments import check, check_out, check_signs

Transform = Callable[[Tensor, Tensor, Tensor | None, float, bool], None]


def run(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    """The operator ``fastrot::hadamard_transform``."""
    if impl == "auto" and x.is_cpu and x.is_contiguous() and x.numel():
        return _cpu().transformed(x, signs, scale, size, dim, transpose)
    check(x, signs, size, dim, impl)
    out = torch.empty_like(x)
    _write(x, signs, scale, size, dim, transpose, impl, out)
    return out


def run_beside(
    a: Tensor, b: Tensor, signs: Tensor | None, scale: float, size: int, transpose: bool
) -> Tensor:
    """The operator along the rows of ``torch.cat((a, b), 1)``; on the CPU in one pass.

    Args:
        a: ``(rows, width)``.
        b: as ``a``, of any width that is a multiple of ``size``.
        signs: as for the operator.
        scale: of the result.
        size: of the blocks.
        transpose: as for the operator.
    """
    alike = a.dtype == b.dtype and len(a) == len(b) and a.device == b.device
    if alike and a.is_cpu and a.numel() and b.numel() and a.stride(1) == 1 == b.stride(1):
        return _cpu().beside(a, b, signs, scale, size, transpose)  # type: ignore[no-any-return]
    return run(torch.cat((a, b), 1), signs, scale, size, 1, transpose, "auto")


def run_into(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
    out: Tensor,
) -> None:
    """The operator ``fastrot::hadamard_transform_into``."""
    check(x, signs, size, dim, impl)
    check_out(x, out)
    in_place = x.data_ptr() == out.data_ptr() and x.stride() == out.stride()
    if not in_place and torch._C._overlaps(x, out):
        x = x.clone()
    if x.is_cpu and x.numel():
        _cpu().require_writable(out)
    _write(x, signs, scale, size, dim, transpose, impl, out)


def backend(impl: str, device: torch.device) -> Transform:
    """The implementation that ``impl`` chooses for tensors on ``device``."""
    if impl == "auto":
        impl = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    return _imported(impl)


@cache
def _imported(impl: str) -> Transform:
    if impl == "cpu":
        from fastrot.kernels.cpu import transform
    elif impl == "triton":
        from fastrot.kernels.gpu import transform
    else:
        from fastrot.kernels.reference import transform
    return transform


@cache
def _cpu() -> ModuleType:
    from fastrot.kernels import cpu

    return cpu


def _write(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
    out: Tensor,
) -> None:
    if signs is not None and signs.is_cpu:
        check_signs(signs)
    if x.numel() == 0:
        return
    if x.is_contiguous() and out.is_contiguous():
        _write_contiguous(x, signs, scale, size, dim, transpose, impl, out)
        return
    source, target = x, out
    if dim == x.dim() - 1 and out.stride(-1) == 1:
        # The leading dimensions only enumerate vectors: take them in memory order.
        order = sorted(range(dim), key=out.stride, reverse=True)
        source, target = x.permute(*order, dim), out.permute(*order, dim)
    source = source.contiguous()
    result = target if target.is_contiguous() else torch.empty_like(source)
    _write_contiguous(source, signs, scale, size, dim, transpose, impl, result)
    if result is not target:
        target.copy_(result)


def _write_contiguous(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
    out: Tensor,
) -> None:
    if impl == "cpu" or (impl == "auto" and x.is_cpu):
        _cpu().write(x, out, size, dim, signs, scale, transpose)
    else:
        shape = -1, size, math.prod(x.shape[dim + 1 :])
        transform = backend(impl, x.device)
        transform(x.view(shape), out.view(shape), signs, scale, transpose)
