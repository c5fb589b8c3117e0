"""Small ±1 matrices as tensor-core operands, shared by the Triton kernels.

A product with a ±1 matrix is exact in every 16-bit format, so only the other operand can lose
bits. 16-bit input loses none. A float32 operand is cut into bfloat16 parts, high bits first, each
the exact remainder of the one before: two parts carry 16 bits, three carry all 24. The products
are then exact and the float32 accumulator is the only thing that rounds.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import concurrent.futures
import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot.hadamard import base_matrix

SYLVESTER = tl.constexpr(1)
TABLE = tl.constexpr(2)


@triton.jit
def matrix(
    table,
    row,
    column,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Entries of I ⊗ H_SIZE, computed, or of a ``(PADDED, PADDED)`` table, loaded."""
    if KIND == SYLVESTER:
        # (-1)^popcount(row & column); the low bits choose inside a block, 0x6996 is a parity table.
        v = row & column & (SIZE - 1)
        if SIZE > 256:
            v ^= v >> 8
        if SIZE > 16:
            v ^= v >> 4
        odd = (0x6996 >> (v & 15)) & 1
        entry = tl.where(odd == 1, -1.0, 1.0)
        if SIZE < PADDED:
            entry = tl.where((row ^ column) < SIZE, entry, 0.0)
        return entry.to(DTYPE)
    else:
        return tl.load(table + row * PADDED + column).to(DTYPE)


@triton.jit
def high_part(x):
    """The upper 16 bits of a float32: x truncated to bfloat16."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def dot_left(m, x, acc, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Return acc + m · x with x in PARTS bfloat16 parts; the products are made in OPERAND.

    Of three parts the smallest comes first: the accumulators of tensor cores truncate, a little at
    every step, and what is truncated is a share of what has been added up so far.
    """
    if PARTS == 1:
        acc = tl.dot(m, x.to(OPERAND), acc, input_precision="ieee")
    elif PARTS == 2:
        high = high_part(x)
        acc = tl.dot(m, high.to(OPERAND), acc, input_precision="ieee")
        acc = tl.dot(m, (x - high).to(tl.bfloat16).to(OPERAND), acc, input_precision="ieee")
    else:
        high = high_part(x)
        middle = high_part(x - high)
        low = (x - high - middle).to(tl.bfloat16)
        acc = tl.dot(m, low.to(OPERAND), acc, input_precision="ieee")
        acc = tl.dot(m, middle.to(OPERAND), acc, input_precision="ieee")
        acc = tl.dot(m, high.to(OPERAND), acc, input_precision="ieee")
    return acc


@triton.jit
def dot_right(x, m, acc, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Return acc + x · m, see :func:`dot_left`."""
    if PARTS == 1:
        acc = tl.dot(x.to(OPERAND), m, acc, input_precision="ieee")
    elif PARTS == 2:
        high = high_part(x)
        acc = tl.dot(high.to(OPERAND), m, acc, input_precision="ieee")
        acc = tl.dot((x - high).to(tl.bfloat16).to(OPERAND), m, acc, input_precision="ieee")
    else:
        high = high_part(x)
        middle = high_part(x - high)
        low = (x - high - middle).to(tl.bfloat16)
        acc = tl.dot(low.to(OPERAND), m, acc, input_precision="ieee")
        acc = tl.dot(middle.to(OPERAND), m, acc, input_precision="ieee")
        acc = tl.dot(high.to(OPERAND), m, acc, input_precision="ieee")
    return acc


@triton.jit
def add_left(m, x, acc, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """As :func:`dot_left`, one of many products that are added up.

    Those of three parts begin anew, and the sum is rounded: nothing would bound what is truncated.
    """
    if PARTS == 3:
        return acc + dot_left(m, x, tl.zeros_like(acc), PARTS, OPERAND)
    else:
        return dot_left(m, x, acc, PARTS, OPERAND)


@triton.jit
def add_right(x, m, acc, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """As :func:`dot_right`, see :func:`add_left`."""
    if PARTS == 3:
        return acc + dot_right(x, m, tl.zeros_like(acc), PARTS, OPERAND)
    else:
        return dot_right(x, m, acc, PARTS, OPERAND)


@functools.cache
def table(
    bases: tuple[int, ...],
    power: int,
    copies: int,
    padded: int,
    flip: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """I_copies ⊗ M₁ ⊗ M₂ ⊗ … ⊗ H_power, or its transpose if ``flip``: ``(padded, padded)``.

    Rows and columns past the end are zero. Made once per process and device, and kept, since
    captured CUDA graphs hold its address. It must not be made while a CUDA graph is recorded: its
    values would exist only after the first replay. Nor must it live in the memory pool of a graph,
    into which torch redirects the allocations of the current thread; so another thread makes it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first Hadamard transform of a size cannot run while a CUDA graph is captured; "
            "run it once before the capture (torch.cuda.graph's usual warm-up does)"
        )

    def make() -> Tensor:
        dense = np.ones((1, 1), dtype=np.int8)
        for m in (*bases, *[2] * (power.bit_length() - 1)):
            dense = np.kron(dense, base_matrix(m))
        dense = np.kron(np.eye(copies, dtype=np.int8), dense.T if flip else dense)
        full = np.zeros((padded, padded), dtype=np.int8)
        full[: len(dense), : len(dense)] = dense
        made = torch.from_numpy(full).to(dtype).to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return made

    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        return worker.submit(make).result()


def padded(order: int) -> int:
    """The power of two, at least the smallest operand of a dot, that holds a matrix."""
    return max(16, triton.next_power_of_2(order))


def parts_of(dtype: torch.dtype, backend: str) -> tuple[torch.dtype, int]:
    """Dtype and number of the parts in which an operand is multiplied without loss.

    CDNA's matrix cores multiply float32 as it is, CUDA's only its parts.
    """
    if dtype != torch.float32:
        return dtype, 1
    return (torch.float32, 1) if backend == "cdna" else (torch.bfloat16, 3)


def parts_between(source: torch.dtype, target: torch.dtype, backend: str) -> int:
    """The parts of what is read in ``source`` and rounded to ``target`` in the end.

    A result of 16 bits needs no more than two.
    """
    parts = parts_of(source, backend)[1]
    return parts if target == torch.float32 else min(parts, 2)


def triton_dtype(dtype: torch.dtype, backend: str) -> tl.dtype:
    """Triton's name of an operand dtype."""
    # The interpreter multiplies the bit patterns of bfloat16; float32 holds the same values.
    if backend == "interpreter" or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def interpreted() -> bool:
    """Whether Triton was imported under ``TRITON_INTERPRET=1``."""
    return not isinstance(high_part, triton.JITFunction)


@functools.lru_cache(maxsize=64)
def backend_of(device: torch.device) -> str:
    """The kind of matrix unit, which decides the launch configuration.

    ``"hopper"``: operands in shared memory (compute capability 9); ``"blackwell"``: results in
    tensor memory as well (10); ``"ampere"``: both in registers (all other NVIDIA GPUs); ``"cdna"``:
    AMD; ``"interpreter"``.
    """
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "hopper", 10: "blackwell"}.get(major, "ampere")
