"""The launches of fused transforms, of RoPE and of weights, as data."""

from collections.abc import Iterator
from typing import Any

import torch
from compiled import BACKENDS, Dot, Launch
from launches import ODD, SHORT, title

from fastrot.kernels.formats import FORMATS, Quantization

GLOBAL = torch.ones(1)

FUSED: tuple[tuple[int, int, torch.dtype, dict[str, Any], Quantization | None], ...] = (
    (4096, 4096, torch.bfloat16, {}, Quantization("int8")),
    (4096, 4096, torch.float32, {}, Quantization("fp8")),
    (4096, 4096, torch.bfloat16, {"gamma": True}, Quantization("mxfp4", blocked_scales=True)),
    (4096, 4096, torch.bfloat16, {"eps": 1e-6}, None),
    (4096, 128, torch.bfloat16, {"eps": 1e-6, "gamma": True}, Quantization("int4", 128)),
    (128, 128, torch.float16, {"eps": 1e-6}, Quantization("fp8")),
    (4096, 128, torch.bfloat16, {}, Quantization("fp8")),
    (4096, 32, torch.bfloat16, {}, Quantization("mxfp4")),
    (4096, 16, torch.bfloat16, {}, Quantization("nvfp4", global_scale=GLOBAL)),
    (8192, 8192, torch.bfloat16, {}, Quantization("fp8")),
    (14336, 14336, torch.bfloat16, {}, Quantization("fp8")),
    (8192, 8192, torch.bfloat16, {"activation": "gelu"}, Quantization("int8")),
    (14336, 14336, torch.bfloat16, {}, Quantization("int4", 128)),
    (14336, 14336, torch.bfloat16, {"gamma": True}, Quantization("fp8")),
    (14336, 14336, torch.bfloat16, {"eps": 1e-6, "gamma": True}, Quantization("mxfp4")),
    (14336, 14336, torch.bfloat16, {"activation": "silu", "signs": True}, Quantization("fp8")),
    (11008, 11008, torch.bfloat16, {}, Quantization("fp8")),
    (11008, 11008, torch.bfloat16, {}, Quantization("mxfp4")),
    (11008, 11008, torch.bfloat16, {"signs": True}, Quantization("int8")),
    (11008, 11008, torch.bfloat16, {"eps": 1e-6}, Quantization("int8")),
    (11008, 11008, torch.bfloat16, {"activation": "silu"}, Quantization("fp8")),
    (11008, 11008, torch.bfloat16, {"activation": "silu"}, Quantization("mxfp4")),
    (11008, 11008, torch.bfloat16, {"activation": "gelu"}, Quantization("fp8")),
    (8192, 8192, torch.bfloat16, {"gamma": True}, Quantization("fp8")),
    (14336, 14336, torch.bfloat16, {"activation": "silu"}, None),
    (14336, 14336, torch.bfloat16, {"activation": "silu"}, Quantization("mxfp4")),
    (
        14336,
        14336,
        torch.bfloat16,
        {"activation": "gelu_tanh"},
        Quantization("nvfp4", global_scale=GLOBAL, blocked_scales=True),
    ),
    (28672, 128, torch.bfloat16, {"activation": "silu"}, Quantization("fp8")),
)
"""Tokens and blocks of transforms: dtype, prologue and whether there are signs, and format."""

ROPE: tuple[tuple[int, int, int, bool, Quantization | None], ...] = (
    (64, 0, 64, False, None),
    (128, 0, 128, False, None),
    (128, 128, 128, False, Quantization("fp8")),
    (128, 128, 128, True, Quantization("int4", 32)),
    (96, 96, 48, False, Quantization("mxfp4")),
    (80, 80, 80, False, Quantization("int8")),
)
"""Size of heads and of values (0 without), rotated elements, whether interleaved, and format."""

WEIGHTS: tuple[tuple[int | None, int | None], ...] = (
    (None, 4096),
    (4096, None),
    (None, 14336),
    (None, 128),
    (128, None),
    (4096, 64),
)
"""Orders of the two sides of a weight."""


def _memory(quantize: Quantization | None, source: str) -> tuple[str, str, float]:
    """Types of codes and scales, and bytes written per element."""
    if quantize is None:
        return f"*{source}", f"*{source}", {"bf16": 2, "fp16": 2, "fp32": 4}[source]
    form = FORMATS[quantize.format]
    codes = "*i8" if quantize.format == "int8" else "*u8"
    scales = "*fp32" if form.scales == torch.float32 else "*u8"
    return codes, scales, 1 / form.per_byte + form.scales.itemsize / (quantize.group or 1 << 12)


def _word(quantize: Quantization | None) -> str:
    if quantize is None:
        return ""
    return quantize.format + f"/{quantize.group_size}" * (quantize.group_size is not None)


def fused_launches(arch: str) -> Iterator[Launch]:
    """The launches of :mod:`fastrot.kernels.gpu_fused` for :data:`FUSED`, where a tile holds it."""
    from fastrot.kernels import gpu_fused, gpu_fused_launch
    from fastrot.kernels.gpu_fused_launch import operands
    from fastrot.kernels.gpu_fused_tiles import Cut, Prologue, fused_tile
    from fastrot.kernels.gpu_matrix import TABLE

    backend = BACKENDS[arch]
    for n, block, dtype, before, quantize in FUSED:
        signs = "signs" in before
        prologue = Prologue(**{k: v for k, v in before.items() if k != "signs"})
        operand, parts, middle, _ = operands(dtype, prologue.exact, backend)
        group = (quantize.group if quantize else None) or 0
        cut = Cut(n, block, group, parts, prologue, signs, dtype, backend)
        tile = fused_tile(cut)
        if tile is None:
            continue
        c = gpu_fused_launch.fused_constants(tile, prologue, quantize, dtype, signs, backend)
        x, one = SHORT[dtype], tile.a == 1
        codes, scales, written = _memory(quantize, x)
        types = dict.fromkeys(("x", "up"), f"*{x}") | {
            "signs": "*i8" if signs else f"*{x}",
            "gamma": "*fp32" if prologue.gamma else f"*{x}",
            "out": codes,
            "scales": scales,
            "left": f"*{SHORT[operand]}" if c["LEFT"] == TABLE.value else f"*{x}",
            "right": f"*{SHORT[operand if one else middle]}" if tile.right_bases else f"*{x}",
            "global_scale": "*fp32" if c["GLOBAL"] else f"*{x}",
            "scale": "fp32",
            "eps": "fp32",
        }
        A, B, left, right = c["A"], c["B"], 0 if one else c["PARTS"], c["MIDDLE_PARTS"]
        trips = 1
        if c["BLOCK"] < B:
            trips = -(-c["COLUMNS"] // c["BLOCK"])
            dots = Dot(A, c["BLOCK"], A, left * trips), Dot(A, B, c["BLOCK"], right * trips)
        elif c["CHUNK"] < A:
            trips = -(-c["TOKEN_ROWS"] // c["CHUNK"])
            dots = Dot(A, B, c["CHUNK"], left * trips), Dot(A, B, B, right, False)
        else:
            k = B if c["RIGHT"] == TABLE.value else c["Q"]
            dots = Dot(A, B, A, left), Dot(A, B, k, right)
        steps = ("gelu" if value == "gelu" else step for step, value in before.items())
        words = (f"{n}/{block} in {A}x{B}", *steps, _word(quantize))
        read = dtype.itemsize * (2 if prologue.activation else 1)
        yield Launch(
            name=title("fused", " ".join(filter(None, words)), dtype, dtype),
            kernel=gpu_fused._fused_kernel,
            types=types,
            integers={"x_stride": n, "up_stride": n, "tokens": ODD},
            constants=c,
            arch=arch,
            elements=tile.tokens * n,
            width=read + written,
            dots=dots,
            trips=trips,
            resident=tile.resident,
            signed=signs,
            gathers=signs
            or prologue.gamma
            or c["GLOBAL"]
            or TABLE.value in (c["LEFT"], c["RIGHT"]),
            scales=quantize is not None,
        )


def rope_launches(arch: str) -> Iterator[Launch]:
    """Launches of :mod:`fastrot.kernels.gpu_rope`; a tile is one of q or k, the mean of both."""
    from fastrot.kernels import gpu_rope, gpu_rope_launch

    source = torch.bfloat16
    for size, value_size, rotary, interleaved, quantize in ROPE:
        heads = gpu_rope_launch.Heads(size, value_size, rotary, size, interleaved, False, False)
        c = gpu_rope_launch.rope_constants(heads, quantize, source, BACKENDS[arch])
        codes, scales, written = _memory(quantize, "bf16")
        types = dict.fromkeys(("q", "k", "v", "q_out", "positions", "signs", "table"), "*bf16") | {
            **dict.fromkeys(("k_out", "v_out"), codes),
            **dict.fromkeys(("k_scales", "v_scales"), scales),
            **dict.fromkeys(("cos", "sin"), "*fp32"),
            "global_scale": "*bf16",
            "scale": "fp32",
        }
        if c["MATRIX"] == gpu_rope_launch.TABLE.value:
            types["table"] = "*" + SHORT[gpu_rope_launch.operands(source, False, BACKENDS[arch])[0]]
        integers = {"tokens": ODD, "q_tiles": ODD, "k_tiles": ODD, "tiles": 3 * ODD}
        integers |= {"q_heads": 32, "k_heads": 8, "v_heads": 8}
        integers |= {f"{x}_token_stride": 6144 for x in "qkv"}
        integers |= {f"{x}_head_stride": size for x in "qk"} | {"v_head_stride": value_size or size}
        integers |= {"cos_stride": rotary // 2, "sin_stride": rotary // 2}
        rows = c["A"]
        how = f"{size}+{value_size}, {rotary} {'interleaved' * interleaved} {_word(quantize)}"
        yield Launch(
            name=title("rope", " ".join(how.split()), source, source),
            kernel=gpu_rope._rope_kernel,
            types=types,
            integers=integers,
            constants=c,
            arch=arch,
            elements=rows * size,
            width=2 + (2 + written) / 2,
            dots=(Dot(rows, c["B"], c["B"], c["PARTS"]),),
            trips=1,
            resident=gpu_rope_launch.rope_config(heads, source, BACKENDS[arch]).resident,
            aligned=rotary == size and size & (size - 1) == 0,
            gathers=True,
            scales=quantize is not None,
        )


def pass_launches(arch: str) -> Iterator[Launch]:
    """Launches of :mod:`fastrot.kernels.gpu_weight_pass` for bfloat16 weights."""
    from fastrot.kernels import gpu_weight, gpu_weight_pass
    from fastrot.kernels.gpu_matrix import TABLE

    seen = set()
    for dtype in (torch.float64, torch.float32):
        for left, right in WEIGHTS:
            sides = (None if order is None else (order, False) for order in (left, right))
            steps = gpu_weight.passes(*sides, BACKENDS[arch])
            for index, step in enumerate(steps):
                c = gpu_weight_pass.pass_constants(step, dtype)
                source = dtype if index else torch.bfloat16
                target = torch.bfloat16 if index == len(steps) - 1 else dtype
                P, Q, arithmetic = c["P"], c["Q"], SHORT[dtype]
                along = "down" if step.down else "along"
                factor = "x".join(str(f.size) for f in (step.h, step.k) if f is not None)
                name = title("pass", f"{factor} {along} in {P}x{Q}", source, target, arithmetic)
                if name in seen:
                    continue
                seen.add(name)
                trips = -(-c["SPAN"] // c["CHUNK"])
                tables = {
                    name: f"*{arithmetic if c[kind] == TABLE.value else SHORT[source]}"
                    for name, kind in (("h_table", "H"), ("k_table", "K"))
                }
                none = dict.fromkeys(
                    ("rows_before", "columns_before", "rows_after", "columns_after"), None
                )
                yield Launch(
                    name=name,
                    kernel=gpu_weight_pass._pass_kernel,
                    types={"x": f"*{SHORT[source]}", "out": f"*{SHORT[target]}", **tables},
                    integers={
                        **dict.fromkeys(("x_stride", "out_stride", "extent", "width"), 8192),
                        **dict.fromkeys(("tiles", "count"), 128),
                        **{"u_rows": c["SPAN"], "v_rows": 1, "v_columns": 16},
                    },
                    constants={**c, **none},
                    arch=arch,
                    elements=c["SPAN"] * Q,
                    width=source.itemsize + target.itemsize,
                    dots=(
                        Dot(P, Q, c["CHUNK"], trips),
                        Dot(c["CHUNK"], Q, Q, trips * (step.k is not None)),
                    ),
                    trips=trips,
                    resident=0,
                    # Where a chunk has 16 bytes for every thread.
                    aligned=arch.startswith("sm")
                    and c["CHUNK"] * Q * source.itemsize >= 512 * c["num_warps"],
                    gathers=TABLE.value in (c["H"], c["K"]),
                )
