"""How a fused kernel cuts tokens into tiles, and its launch."""

import functools
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastrot.hadamard import factors
from fastrot.kernels.formats import Quantization, Quantized
from fastrot.kernels.gpu import _check, _guard, _multiprocessors
from fastrot.kernels.gpu_formats import KINDS
from fastrot.kernels.gpu_fused import ACTIVATIONS, PLAIN, RMSNORM, _fused_kernel
from fastrot.kernels.gpu_matrix import (
    SYLVESTER,
    TABLE,
    backend_of,
    interpreted,
    padded,
    parts_of,
    table,
    triton_dtype,
)
from fastrot.kernels.gpu_tiles import Config, config_for, product


class Cut(NamedTuple):
    """What decides how tokens are cut."""

    n: int
    block: int
    group: int
    """Elements that share a scale, 0 for a token."""
    parts: int
    """Of the input of the first product."""
    exact: bool
    """Whether that is x as it is in memory; else float32, which takes twice the registers."""
    source: torch.dtype
    backend: str


@dataclass(frozen=True)
class FusedTile:
    """``tokens`` of ``token_rows × columns`` elements in ``(A, B)``; blocks are H_a ⊗ H_b."""

    left_bases: tuple[int, ...]
    left_power: int
    right_bases: tuple[int, ...]
    right_power: int
    columns: int
    token_rows: int
    tokens: int
    A: int
    B: int
    config: Config

    @property
    def a(self) -> int:
        """The order of the left factor."""
        return product(self.left_bases, self.left_power)

    @property
    def b(self) -> int:
        """The order of the right factor."""
        return product(self.right_bases, self.right_power)

    @property
    def chunked(self) -> bool:
        """Whether the left matrix is loaded in parts, for every tile, and not kept."""
        return self.A > 128 and self.a > 1

    @property
    def resident(self) -> int:
        """Programs of a persistent launch on each multiprocessor, 0 for one per tile."""
        return 0 if self.chunked else self.config.resident


@functools.lru_cache(maxsize=1024)
def fused_tile(cut: Cut) -> FusedTile | None:
    """The cut with the least arithmetic for which there is a configuration, None without any."""
    return min(fused_tiles(cut), key=itemgetter(0), default=(0.0, None))[1]


def fused_tiles(cut: Cut) -> list[tuple[float, FusedTile]]:
    """Every cut for which there is a configuration, and its cost."""
    if cut.group & (cut.group - 1):
        return []  # Triton's tiles have powers of two
    bases, power = factors(cut.block)
    vectors = cut.n // cut.block
    found: list[tuple[float, FusedTile]] = []
    for first in range(len(bases) + 1):
        for bit in range(power.bit_length() if first == len(bases) else 1):
            right = bases[first:], power >> bit
            left = bases[:first], power // right[1]
            a, b = product(*left), product(*right)
            most = vectors if a == 1 else 1
            for packed in (p for p in range(1, most + 1) if most % p == 0 and p * b <= 256):
                columns, rows = packed * b, vectors * a // packed
                B, A = padded(columns), max(64, padded(rows))
                if B > 256 or A > 256 or (cut.group and columns % cut.group):
                    continue
                config = _config(A, B, a, cut)
                if config is None:
                    continue
                tokens = A // rows
                cost = float((A * cut.parts if a > 1 else 0) + B * (2 if a > 1 else cut.parts))
                cost += max(A, B) / 16  # of equals the squarest
                cost *= A * B / (tokens * rows * columns)
                cost *= 1.0 if columns % 8 == 0 else 1.5  # narrow accesses
                cost *= 1.0 if A * B >= 4096 else 3.0  # too little to load at a time
                cost *= 1.5 if A > 128 and a > 1 else 1.0  # loads its left matrix for every tile
                tile = FusedTile(*left, *right, columns, rows, tokens, A, B, config)
                found.append((cost, tile))
    return found[::-1]  # of equals the last


def _config(A: int, B: int, a: int, cut: Cut) -> Config | None:
    # Without a left matrix, a tile of many rows is like one of few.
    rows = min(A, 128) if a == 1 else A
    # Hopper and Blackwell hold results of products elsewhere than operands.
    wide = not cut.exact and cut.backend in ("ampere", "cdna")
    source = torch.float32 if wide else cut.source
    config = config_for(rows, A * B // rows if a == 1 else B, source, source, cut.backend)
    if config is None or cut.exact or config.num_warps < 8:
        return config
    return config._replace(resident=min(config.resident, 1))


class Prologue(NamedTuple):
    """What happens to x before the transform; see :mod:`fastrot.kernels.fused`."""

    activation: str | None = None
    eps: float | None = None
    gamma: bool = False

    @property
    def kind(self) -> int:
        """The kernel's number for it."""
        if self.activation is not None:
            return ACTIVATIONS[self.activation]
        return PLAIN.value if self.eps is None else RMSNORM.value

    @property
    def exact(self) -> bool:
        """Whether the transform sees x as it is in memory."""
        return self.activation is None and not self.gamma


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
        "B": tile.B,
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
        prologue.exact,
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
