"""RoPE and R3 in one operator: what queries and keys need between projection and cache.

The operator is ``torch.ops.fastrot.rope_hadamard``; what :mod:`fastrot.kernels.fused` says of its
operator holds for this one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrot.errors import RotationError
from fastrot.hadamard import factors
from fastrot.kernels.arguments import (
    DTYPES,
    check_impl,
    check_place,
    check_scale,
    check_signs,
)
from fastrot.kernels.formats import Quantization, Quantized, empty_result, round_result
from fastrot.kernels.fused import on_triton, quantization, transformed
from fastrot.kernels.reference import compute_dtype


class RotatedHeads(NamedTuple):
    """Queries, keys and values; the latter two quantised if asked for."""

    q: Tensor
    k: Tensor | Quantized
    v: Quantized | None


def rope_hadamard(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    v: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    quantize: Quantization | str | None = None,
    scale: float | None = None,
    block_size: int | None = None,
    signs: Tensor | None = None,
    impl: str = "auto",
) -> RotatedHeads:
    """Transform ``rope(q)`` and ``rope(k)``, and quantise keys and values for the cache.

    Args:
        q: ``(…, heads, head_size)``, float64, float32, bfloat16 or float16. Tokens and heads may
            have any stride: a slice of a fused projection will do, or ``q.transpose(1, 2)`` where
            heads come before tokens.
        k: ``(…, kv_heads, head_size)``.
        cos: ``(…, rotary / 2)``, one for each pair of elements, with leading dimensions that
            broadcast to those of ``q``; or a row for every position if ``positions`` is given. The
            first ``rotary`` elements of a head are turned. The tables of transformers hold each
            angle twice: pass ``cos[..., : rotary // 2]``.
        sin: as ``cos``.
        v: ``(…, kv_heads, value_size)``, to be quantised as it is (R2 rotates it offline).
        positions: the row of ``cos`` and ``sin`` for each token, integers of the leading shape of
            ``q``.
        interleaved: pairs are neighbours, not elements that are ``rotary / 2`` apart.
        quantize: the format of keys and values, each head of each token apart; default the dtype
            of ``k``.
        scale: factor of the transform; default ``block_size ** -0.5``, which is orthonormal.
        block_size: apply ``I ⊗ H`` with blocks of this size; default the head size.
        signs: ``(block_size,)`` of ±1, the diagonal of ``D``; default the identity.
        impl: as for :func:`fastrot.hadamard_transform`.

    Returns:
        New contiguous tensors of the shapes of ``q``, ``k`` and ``v``, or their codes and scales.

    Raises:
        RotationError: as :func:`fastrot.kernels.fused.hadamard_quantize`; values without a format.
        TypeError: ``q`` is not a tensor of one of the four dtypes.

    Source of the rotary embedding: Su et al., "RoFormer", 2021, section 3.2.2.
    """
    if not isinstance(q, Tensor) or q.dim() < 2:
        what = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"rope_hadamard needs a tensor of shape (…, heads, head_size), got {what}")
    form = quantization(quantize)
    block = q.shape[-1] if block_size is None else block_size
    for name, x in (("k", k), ("cos", cos), ("sin", sin)):
        if not isinstance(x, Tensor) or not x.dim():
            found = "a scalar" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {found}, expected a tensor")
    if scale is not None:
        check_scale(scale)
    if positions is None:
        cos, sin = (_angles(name, t, q) for name, t in (("cos", cos), ("sin", sin)))
    rotated, k_codes, k_scales, v_codes, v_scales = torch.ops.fastrot.rope_hadamard(
        q,
        k,
        v,
        cos,
        sin,
        positions,
        signs,
        None if form is None else form.global_scale,
        interleaved,
        block,
        scale if scale is not None else max(block, 1) ** -0.5,
        None if form is None else form.format,
        None if form is None else form.group_size,
        form is not None and form.blocked_scales,
        impl,
    )
    return RotatedHeads(
        rotated,
        k_codes if form is None else Quantized(k_codes, k_scales),
        None if v is None else Quantized(v_codes, v_scales),
    )


def _angles(name: str, table: Tensor, q: Tensor) -> Tensor:
    """A row for each token."""
    try:
        return table.expand(*q.shape[:-2], table.shape[-1])
    except RuntimeError:
        raise RotationError(
            f"{name} has shape {tuple(table.shape)}, whose leading dimensions do not broadcast to "
            f"those of q, {tuple(q.shape[:-2])}; with positions it has a row for each position"
        ) from None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    signs: Tensor | None,
    block: int,
    quantize: Quantization | None,
    impl: str,
) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"rope_hadamard takes float64, float32, bfloat16 or float16, got {q.dtype}")
    factors(block)
    leading, size = q.shape[:-2], q.shape[-1]
    if size % block:
        raise RotationError(f"block_size={block} does not divide the head size {size}")
    if v is not None and quantize is None:
        raise RotationError(
            "v would be returned as it is: give a format in quantize, or leave it out"
        )
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dtype != q.dtype or x.dim() != q.dim() or x.shape[:-2] != leading):
            raise RotationError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}, but q {q.dtype} of "
                f"{tuple(q.shape)}: dtype and leading dimensions must agree"
            )
    if k.shape[-1] != size:
        raise RotationError(f"k has head size {k.shape[-1]}, but q {size}")
    if cos.shape != sin.shape or not 0 < 2 * cos.shape[-1] <= size:
        raise RotationError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}: they must agree, "
            f"with one angle for each pair of at most {size} elements in the last dimension"
        )
    if positions is not None:
        if positions.shape != leading or positions.dtype not in (torch.int32, torch.int64):
            raise RotationError(
                f"positions is {positions.dtype} of shape {tuple(positions.shape)}, expected "
                f"int64 or int32 of shape {tuple(leading)}"
            )
        if cos.dim() != 2:
            raise RotationError(
                f"with positions, cos and sin have a row for each, got shape {tuple(cos.shape)}"
            )
    if signs is not None:
        check_place(signs, block, q.device)
    world = None if quantize is None else quantize.global_scale
    named = {"k": k, "v": v, "cos": cos, "sin": sin, "positions": positions}
    for name, value in (named | {"global_scale": world}).items():
        if value is not None and value.device != q.device:
            raise RotationError(f"{name} is on {value.device}, but q on {q.device}")
    if quantize is not None:
        for x in (k, v):
            if x is not None:
                quantize.check(x.shape[-1])
    check_impl(impl, q.device)


def _check_values(positions: Tensor | None, rows: int, signs: Tensor | None) -> None:
    """Refuse what can be seen without waiting for a device."""
    if signs is not None and signs.is_cpu:
        check_signs(signs)
    if positions is not None and positions.is_cpu and positions.numel():
        least, most = (int(value) for value in positions.aminmax())
        if least < 0 or most >= rows:
            raise RotationError(
                f"positions are from {least} to {most}, but cos and sin have {rows} rows"
            )


def _embed(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    a, b = pairs.unbind(axis)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2)
    return torch.cat((turned, rest), -1)


@torch.library.custom_op("fastrot::rope_hadamard", mutates_args=())
def _rope_hadamard(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    signs: Tensor | None,
    global_scale: Tensor | None,
    interleaved: bool,
    block: int,
    scale: float,
    format: str | None,
    group_size: int | None,
    blocked_scales: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    quantize = Quantization(format, group_size, global_scale, blocked_scales) if format else None
    _check(q, k, v, cos, sin, positions, signs, block, quantize, impl)
    _check_values(positions, len(cos), signs)
    if q.numel() + k.numel() and on_triton(impl, q.device):
        from fastrot.kernels.gpu_rope_launch import transform

        out, k_out = empty_result(q, None), empty_result(k, quantize)
        v_out = None if v is None else empty_result(v, quantize)
        if transform(
            _rows(q, 2),
            _rows(k, 2),
            None if v is None else _rows(v, 2),
            _rows(cos, 1),
            _rows(sin, 1),
            None if positions is None else positions.reshape(-1),
            signs,
            out.codes,
            k_out,
            v_out,
            interleaved,
            block,
            scale,
            quantize,
        ):
            return (out.codes, *k_out, *(v_out or _nothing(q)))
    dtype = compute_dtype(q.dtype)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (t.to(dtype).unsqueeze(-2) for t in (cos, sin))
    q_rotated, k_rotated = (
        transformed(_embed(x.to(dtype), cos, sin, interleaved), signs, block, scale, impl)
        for x in (q, k)
    )
    k_out = round_result(k_rotated, k.dtype, quantize)
    v_out = None if v is None else round_result(v.to(dtype), v.dtype, quantize)
    return (q_rotated.to(q.dtype), *k_out, *(v_out or _nothing(q)))


def _nothing(q: Tensor) -> Quantized:
    """An operator's results are tensors, whether there are values or not."""
    return Quantized(q.new_empty(0), q.new_empty(0))


def _rows(x: Tensor, kept: int) -> Tensor:
    """The dimensions before the last ``kept`` as one, unit stride along the last."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(math.prod(x.shape[:-kept]), *x.shape[-kept:])


@_rope_hadamard.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    signs: Tensor | None,
    global_scale: Tensor | None,
    interleaved: bool,
    block: int,
    scale: float,
    format: str | None,
    group_size: int | None,
    blocked_scales: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    quantize = Quantization(format, group_size, global_scale, blocked_scales) if format else None
    _check(q, k, v, cos, sin, positions, signs, block, quantize, impl)
    v_out = _nothing(q) if v is None else empty_result(v, quantize)
    return (empty_result(q, None).codes, *empty_result(k, quantize), *v_out)
