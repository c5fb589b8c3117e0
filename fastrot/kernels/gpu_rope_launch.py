"""The launch of the RoPE kernel."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastrot.hadamard import factors
from fastrot.kernels.formats import Quantization, Quantized
from fastrot.kernels.gpu import _check, _guard, _multiprocessors
from fastrot.kernels.gpu_formats import KINDS
from fastrot.kernels.gpu_fused_launch import as_bytes, converts, operands
from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    backend_of,
    interpreted,
    padded,
    table,
    triton_dtype,
)
from fastrot.kernels.gpu_rope import _rope_kernel
from fastrot.kernels.gpu_tiles import Config

ROWS = 64
"""Vectors in a tile: the smallest that all matrix units take without repeating work."""
LARGEST_HEAD = 128
"""Of longer ones, registers would spill on every GPU."""

MOST_VECTORS = 1 << 31
"""The kernel counts them in 32 bits."""


class Heads(NamedTuple):
    """What a launch is compiled for."""

    size: int
    value_size: int
    """0 without values."""
    rotary: int
    block: int
    interleaved: bool
    positions: bool
    signs: bool


def transform(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    signs: Tensor | None,
    q_out: Tensor,
    k_out: Quantized,
    v_out: Quantized | None,
    interleaved: bool,
    block: int,
    scale: float,
    quantize: Quantization | None,
) -> bool:
    """Fill the outputs in one launch and return True; False where it can't.

    Arguments as in :mod:`fastrot.kernels.rope`, except that ``q``, ``k`` and ``v`` are
    ``(tokens, heads, size)`` and ``cos`` and ``sin`` ``(tokens, rotary / 2)``, or one row per
    position, all with unit stride along the last dimension; outputs are contiguous.
    """
    _check(q)
    if interpreted() and q.dtype == torch.bfloat16:
        # The interpreter has no bfloat16 arithmetic; float32 holds the same values.
        wide = q_out.float()
        k_wide = k_out if quantize else Quantized(k_out.codes.float(), k_out.scales)
        q, k, v = q.float(), k.float(), None if v is None else v.float()
        done = transform(
            q, k, v, cos, sin, positions, signs, wide, k_wide, v_out, interleaved, block, scale,
            quantize,
        )  # fmt: skip
        q_out.copy_(wide)
        if k_wide is not k_out:
            k_out.codes.copy_(k_wide.codes)
        return done
    heads = Heads(
        size=q.shape[-1],
        value_size=0 if v is None else v.shape[-1],
        rotary=2 * cos.shape[-1],
        block=block,
        interleaved=interleaved,
        positions=positions is not None,
        signs=signs is not None,
    )
    if q.dtype == torch.float64 or max(heads.size, heads.value_size) > LARGEST_HEAD:
        return False
    vectors = max(x.shape[0] * x.shape[1] for x in (q, k, k if v is None else v))
    if vectors + ROWS >= MOST_VECTORS:
        return False
    group = (quantize.group if quantize else None) or 0
    if group & (group - 1):
        return False  # Triton's tiles have powers of two
    backend = backend_of(q.device)
    constants = rope_constants(heads, quantize, q.dtype, backend)
    bases, power = factors(block)
    h = q
    if bases:
        dtype = operands(q.dtype, False, backend).dtype
        h = table(bases, power, heads.size // block, constants["B"], False, dtype, q.device)
    k_codes, k_scales = as_bytes(k_out, quantize)
    v_codes, v_scales = (k_codes, k_scales) if v_out is None else as_bytes(v_out, quantize)
    q_tiles, k_tiles, v_tiles = (
        0 if x is None else triton.cdiv(x.shape[0] * x.shape[1], ROWS) for x in (q, k, v)
    )
    tiles = q_tiles + k_tiles + v_tiles
    v = k if v is None else v
    world = quantize.global_scale if quantize else None
    programs = rope_config(heads, q.dtype, backend).resident * _multiprocessors(q.device)
    with _guard(q):
        _rope_kernel[(min(tiles, programs),)](
            q,
            k,
            v,
            q_out,
            k_codes,
            v_codes,
            k_scales,
            v_scales,
            cos,
            sin,
            q if positions is None else positions,
            q if signs is None else signs,
            h,
            q if world is None else world,
            scale,
            q.shape[0],
            q_tiles,
            k_tiles,
            tiles,
            q.shape[1],
            k.shape[1],
            v.shape[1],
            q.stride(0),
            k.stride(0),
            v.stride(0),
            q.stride(1),
            k.stride(1),
            v.stride(1),
            cos.stride(0),
            sin.stride(0),
            **constants,
        )
    return True


def rope_config(heads: Heads, source: torch.dtype, backend: str) -> Config:
    """How a launch is configured, so that nothing spills."""
    size = padded(heads.size)
    if size <= 64:
        return Config(4, size, 2, 1)
    # Both elements of a pair come from one load of each, so that there is room for a prefetch.
    paired = heads.rotary == heads.size == size and source != torch.float32
    if backend in ("hopper", "interpreter") and paired and not heads.signs:
        return Config(4, 64, 2, 2)
    return Config(8, 64, 1, 1)


def rope_constants(
    heads: Heads, quantize: Quantization | None, source: torch.dtype, backend: str
) -> dict[str, Any]:
    """The compile-time arguments and options of a launch."""
    dtype, parts, _, _ = operands(source, False, backend)
    config = rope_config(heads, source, backend)
    form = quantize.format if quantize else None
    return {
        "A": ROWS,
        "B": padded(heads.size),
        "SIZE": heads.size,
        "VALUES": heads.value_size > 0,
        "V_SIZE": heads.value_size,
        "V_B": padded(heads.value_size),
        "ROTARY": heads.rotary,
        "INTERLEAVED": heads.interleaved,
        "POSITIONS": heads.positions,
        "SIGNS": heads.signs,
        "BLOCK": config.block,
        "BLOCK_SIZE": heads.block,
        "MATRIX": TABLE.value if factors(heads.block)[0] else SYLVESTER.value,
        "PARTS": parts,
        "OPERAND": triton_dtype(dtype, backend),
        "KIND": KINDS[form],
        "GROUP": (quantize.group if quantize else None) or 0,
        "BLOCKED": quantize.blocked_scales if quantize else False,
        "GLOBAL": quantize is not None and quantize.global_scale is not None,
        "NATIVE": converts(form, backend),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
