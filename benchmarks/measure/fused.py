"""The fused operators as rows of the benchmark: each beside the kernels that it stands for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from measure.operator import Data, Operator
from measure.oracle import transformed
from measure.timing import Run

EPS = 1e-6

HEAD = 128
"""Elements of a head, and of the blocks that have no size of their own."""


def blocks(rows: Tensor, size: int) -> Tensor:
    """The exact transform of blocks of float64 rows."""
    return transformed(rows.reshape(-1, size), None).view(rows.shape)


def plain(x: Tensor, size: int) -> Tensor:
    """The transform of blocks by its own kernel."""
    from fastrot.kernels import hadamard_transform

    return hadamard_transform(x, size**-0.5, block_size=size, impl="triton")


@cache
def formed(format: str | None) -> Any:
    """The format with its default options; the library is not imported before it is needed."""
    from fastrot.kernels import Quantization

    return None if format is None else Quantization(format)


def bytes_per_element(format: str) -> float:
    """Of codes and of the scales of groups; those of tokens do not count."""
    from fastrot.kernels.formats import FORMATS

    row = FORMATS[format]
    return 1 / row.per_byte + (1 / row.group if row.group else 0)


def fused(
    format: str | None,
    inputs: int,
    call: Callable[[Data, Any, int], Any],
    before: Callable[[tuple[Tensor, ...]], Tensor],
    block: int | None = None,
) -> Operator:
    """An operator that does ``before``, transforms blocks and quantises to ``format``.

    Its peers are the same by several kernels: ``before`` by torch (unless that is nothing), the
    transform, and the format by the fused kernel with blocks of one, which transform nothing.
    """

    def size(x: Tensor) -> int:
        return min(block or x.shape[-1], x.shape[-1])

    def pipelines(data: Data) -> dict[str, Run]:
        from fastrot.kernels import hadamard_quantize

        form = formed(format)

        def several() -> Any:
            y = plain(before(data.inputs), size(data.x))
            return y if form is None else hadamard_quantize(y, form, block_size=1, impl="triton")

        def by_torch() -> Any:
            return form.quantize(plain(before(data.inputs), size(data.x)).float())

        return {"several kernels": several} | ({} if form is None else {"by torch": by_torch})

    def width(itemsize: int) -> float:
        return inputs * itemsize + (bytes_per_element(format) if format else itemsize)

    def values(output: Any) -> Tensor:
        return formed(format).dequantize(output) if format else output

    def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
        if format is None:
            return exact.to(dtype)
        form = formed(format)
        return form.dequantize(form.quantize(exact), torch.float64)

    return Operator(
        lambda data: call(data, formed(format), size(data.x)),
        pipelines,
        lambda rows, _: blocks(before(tuple(r.double() for r in rows)), size(rows[0])),
        inputs,
        width,
        values,
        rounded,
    )


def _quantize(data: Data, form: Any, size: int) -> Any:
    from fastrot.kernels import hadamard_quantize

    return hadamard_quantize(data.x, form, block_size=size, impl="triton")


def _glu(data: Data, form: Any, size: int) -> Any:
    from fastrot.kernels import glu_hadamard

    return glu_hadamard(*data.inputs, form, block_size=size, impl="triton")


def _rmsnorm(data: Data, form: Any, size: int) -> Any:
    from fastrot.kernels import rmsnorm_hadamard

    return rmsnorm_hadamard(data.x, None, form, eps=EPS, block_size=size, impl="triton")


def _normed(inputs: tuple[Tensor, ...]) -> Tensor:
    return functional.rms_norm(inputs[0], inputs[0].shape[-1:], None, EPS)


def _activated(inputs: tuple[Tensor, ...]) -> Tensor:
    return functional.silu(inputs[0]) * inputs[1]


@cache
def _angles(
    rows: int, head: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same cosines and sines for every token, so that any part of the rows has the same."""
    angles = torch.arange(head // 2, device=device, dtype=torch.float64) * 0.7 + 0.1
    cos, sin = (t.to(dtype).expand(rows, -1).contiguous() for t in (angles.cos(), angles.sin()))
    return cos, sin


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, min(HEAD, x.shape[-1])))


def _embedded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE by torch on rows of heads."""
    heads = _heads(x)
    cos, sin = (t[:, None] for t in _angles(len(x), heads.shape[-1], dtype, x.device))
    first, second = heads.chunk(2, -1)
    both = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return both.flatten(-2)


def rope() -> Operator:
    """RoPE and R3 on queries and as many keys."""

    def call(data: Data) -> tuple[Tensor, Tensor]:
        from fastrot.kernels import rope_hadamard

        q, k = map(_heads, data.inputs)
        cos, sin = _angles(len(q), q.shape[-1], torch.float32, q.device)
        out = rope_hadamard(q, k, cos, sin, impl="triton")
        return out.q.flatten(-2), out.k.flatten(-2)

    def pipelines(data: Data) -> dict[str, Run]:
        def several() -> list[Tensor]:
            head = min(HEAD, data.x.shape[-1])
            return [plain(_embedded(x, x.dtype), head) for x in data.inputs]

        return {"several kernels": several}

    def exact(rows: tuple[Tensor, ...], _: Tensor | None) -> Tensor:
        head = min(HEAD, rows[0].shape[-1])
        return torch.cat([blocks(_embedded(r.double(), torch.float64), head) for r in rows], -1)

    return Operator(
        call, pipelines, exact, 2, lambda itemsize: 4 * itemsize, lambda pair: torch.cat(pair, -1)
    )


def operators() -> dict[str, Operator]:
    """All rows, by name."""

    def itself(inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0]

    rows = {f: fused(f, 1, _quantize, itself) for f in ("int8", "fp8", "int4", "mxfp4", "nvfp4")}
    rows |= {f"{f}, blocks": fused(f, 1, _quantize, itself, b) for f, b in BLOCKS.items()}
    rows |= {f"SiLU, {f}": fused(f, 2, _glu, _activated) for f in ("fp8", "mxfp4")}
    rows["SiLU"] = fused(None, 2, _glu, _activated)
    rows["RMSNorm, fp8, blocks"] = fused("fp8", 1, _rmsnorm, _normed, HEAD)
    return rows | {"RoPE": rope()}


BLOCKS = {"fp8": HEAD, "mxfp4": 32, "nvfp4": 16}
"""The blocks of rotations that a format is used with."""
