"""The launch of a fused kernel."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastrot.kernels.formats import Quantization, Quantized
from fastrot.kernels.gpu import _check, _guard, _multiprocessors
from fastrot.kernels.gpu_formats import KINDS
from fastrot.kernels.gpu_fused import _fused_kernel
from fastrot.kernels.gpu_fused_tiles import Cut, FusedTile, Prologue, fused_tile
from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    backend_of,
    interpreted,
    parts_of,
    table,
    triton_dtype,
)


class Operands(NamedTuple):
    """Dtype and number of the parts of what the two products multiply; see `gpu_matrix`."""

    dtype: torch.dtype
    parts: int
    middle_dtype: torch.dtype
    middle_parts: int


def operands(source: torch.dtype, exact: bool, backend: str) -> Operands:
    """The parts of x, if it is ``exact``, or of a float32 result, and of the intermediate."""
    dtype, parts = parts_of(torch.float32, backend)
    middle = dtype, min(parts, 3 if source == torch.float32 else 2)
    return Operands(*(parts_of(source, backend) if exact else middle), *middle)


def fused_constants(
    tile: FusedTile,
    prologue: Prologue,
    quantize: Quantization | None,
    source: torch.dtype,
    signs: bool,
    backend: str,
) -> dict[str, Any]:
    """The compile-time arguments and options of a launch."""
    dtype, parts, middle_dtype, middle_parts = operands(source, prologue.exact, backend)
    one_product = tile.a == 1
    if one_product:
        middle_dtype, middle_parts = dtype, parts
    config = tile.config
    form = quantize.format if quantize else None
    return {
        "A": tile.A,
        "P": config.rows or tile.A,
        "B": tile.B,
        "Q": config.columns or tile.B,
        "COLUMNS": tile.columns,
        "TOKEN_ROWS": tile.token_rows,
        "TOKENS": tile.tokens,
        "LEFT_SIZE": tile.a,
        "LEFT": 0 if one_product else TABLE.value if tile.left_bases else SYLVESTER.value,
        "RIGHT_SIZE": tile.b,
        "RIGHT": TABLE.value if tile.right_bases else SYLVESTER.value,
        "CHUNK": (16 if parts == 3 else 32) if tile.chunked else tile.A,
        "BLOCK": tile.B if tile.chunked else min(config.block or tile.B, tile.B),
        "PERSISTENT": tile.resident > 0,
        "PROLOGUE": prologue.kind,
        "FAST": backend != "interpreter",
        "GAMMA": prologue.gamma,
        "SIGNS": signs,
        "PARTS": parts,
        "MIDDLE_PARTS": middle_parts,
        "OPERAND": triton_dtype(dtype, backend),
        "MIDDLE_OPERAND": triton_dtype(middle_dtype, backend),
        "KIND": KINDS[form],
        "GROUP": (quantize.group if quantize else None) or 0,
        "BLOCKED": quantize.blocked_scales if quantize else False,
        "GLOBAL": quantize is not None and quantize.global_scale is not None,
        "NATIVE": converts(form, backend),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def transform(
    x: Tensor,
    up: Tensor | None,
    gamma: Tensor | None,
    signs: Tensor | None,
    out: Quantized,
    block: int,
    scale: float,
    activation: str | None,
    eps: float | None,
    quantize: Quantization | None,
) -> bool:
    """Fill ``out`` in one pass over ``x`` and return True; False if no tile holds a token.

    Arguments as in :mod:`fastrot.kernels.fused`; ``out`` is contiguous, and without ``quantize``
    the result goes to its codes.
    """
    _check(x)
    if x.dtype == torch.float64:
        return False
    if interpreted() and x.dtype == torch.bfloat16:
        # The interpreter has no bfloat16 arithmetic; float32 holds the same values.
        wide = out if quantize else Quantized(out.codes.float(), out.scales)
        up = None if up is None else up.float()
        done = transform(x.float(), up, gamma, signs, wide, block, scale, activation, eps, quantize)
        if wide is not out:
            out.codes.copy_(wide.codes)
        return done
    rows = _rows(x)
    backend = backend_of(x.device)
    prologue = Prologue(activation, eps, gamma is not None)
    cut = Cut(
        rows.shape[1],
        block,
        (quantize.group if quantize else None) or 0,
        operands(x.dtype, prologue.exact, backend).parts,
        prologue,
        signs is not None,
        x.dtype,
        backend,
    )
    tile = fused_tile(cut)
    if tile is None:
        return False
    with _guard(x):
        _launch(
            rows,
            None if up is None else _rows(up),
            gamma,
            signs,
            out,
            scale,
            prologue,
            quantize,
            tile,
            backend,
        )
    return True


def _rows(x: Tensor) -> Tensor:
    """``(tokens, n)`` with unit stride along n, a view where there is one."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def _launch(
    x: Tensor,
    up: Tensor | None,
    gamma: Tensor | None,
    signs: Tensor | None,
    out: Quantized,
    scale: float,
    prologue: Prologue,
    quantize: Quantization | None,
    tile: FusedTile,
    backend: str,
) -> None:
    tokens = x.shape[0]
    dtype, _, middle_dtype, _ = operands(x.dtype, prologue.exact, backend)
    if tile.a == 1:
        middle_dtype = dtype
    left = right = x
    if tile.left_bases:
        copies = tile.A // tile.a
        left = table(tile.left_bases, tile.left_power, copies, tile.A, True, dtype, x.device)
    if tile.right_bases:
        bases, power, copies = tile.right_bases, tile.right_power, tile.columns // tile.b
        right = table(bases, power, copies, tile.B, False, middle_dtype, x.device)
    programs = triton.cdiv(tokens, tile.tokens)
    if tile.resident:
        programs = min(programs, tile.resident * _multiprocessors(x.device))
    world = quantize.global_scale if quantize else None
    codes, scales = as_bytes(out, quantize)
    _fused_kernel[(programs,)](
        x,
        x if up is None else up,
        x if gamma is None else gamma,
        x if signs is None else signs,
        codes,
        scales,
        left,
        right,
        x if world is None else world,
        scale,
        prologue.eps or 0.0,
        x.stride(0),
        0 if up is None else up.stride(0),
        tokens,
        **fused_constants(tile, prologue, quantize, x.dtype, signs is not None, backend),
    )


def converts(format: str | None, backend: str) -> bool:
    """Whether the GPU has an instruction for it: e4m3 since Hopper, e2m1 since Blackwell."""
    return backend == "blackwell" or (backend == "hopper" and format == "fp8")


def as_bytes(out: Quantized, quantize: Quantization | None) -> Quantized:
    """The memory of a result as the kernels address it, see `gpu_formats.store_tile`."""
    if quantize is None:
        return out
    codes, scales = out
    codes = codes.view(torch.int8 if quantize.format == "int8" else torch.uint8)
    return Quantized(codes, scales if scales.dtype == torch.float32 else scales.view(torch.uint8))
