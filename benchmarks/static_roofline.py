"""What the Triton kernels can reach, predicted from their machine code: no GPU is needed.

Every launch that fastrot makes for a transform is compiled, and its instructions are counted. The
table states what the slowest of three things allows: memory, issuing instructions, multiplying. It
is a prediction, and an upper bound: latencies, barriers, shared memory, the partly filled last wave
of programs, and that Hopper's tensor cores are slower for the instructions of older GPUs (HMMA) are
not in it. Measured figures come from `gpu.py`.

    python benchmarks/static_roofline.py --sizes 4096 14336 --arch sm_90
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compiled import BACKENDS, DTYPES, Compiled, Launch, axis_launch, compile_launch, rows_launch
from gpu import SIZES

from fastrot.hadamard import factors

COPY = 0.92
"""Share of the memory's nominal bandwidth that a copy reaches (an assumption, for every GPU)."""

LANES = 128
"""Instructions of threads that a multiprocessor issues per cycle: four warps of 32."""

TENSOR_BYTES = 256 << 20
"""Size of the tensor over which a persistent program's start is spread."""

COLUMNS = 8192
"""Vectors that lie side by side when they lie along the first dimension."""


@dataclass(frozen=True)
class GPU:
    """The vendor's figures: the highest clock, dense products without sparsity."""

    name: str
    arch: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    flops16: float
    """bf16 and fp16 on tensor cores."""
    flops64: float
    """Outside of tensor cores."""


GPUS = (
    GPU("A100", "sm_80", 108, 1.41e9, 2.039e12, 312e12, 9.7e12),
    GPU("H100", "sm_90", 132, 1.98e9, 3.35e12, 989e12, 33.5e12),
    GPU("H200", "sm_90", 132, 1.98e9, 4.8e12, 989e12, 33.5e12),
    GPU("B200", "sm_100", 148, 1.965e9, 8.0e12, 2250e12, 37e12),
)


def launches(n: int, dtype: torch.dtype, dim: int, signs: bool, arch: str) -> tuple[Launch, ...]:
    """The passes of one transform along the last (-1) or the first (0) dimension."""
    from fastrot.kernels.gpu import _route

    route = _route(*factors(n), dim == -1, dtype, BACKENDS[arch])
    steps = [*route.passes, *[route.tile] * (route.tile is not None)]
    scratch = torch.float32 if dtype.itemsize == 2 else dtype
    made, inner = [], n if dim == -1 else n * COLUMNS
    for index, step in enumerate(steps):
        source = scratch if index else dtype
        target = dtype if step is steps[-1] else scratch
        signed = signs and index == 0
        if index < len(route.passes):
            inner //= step.size
            made.append(axis_launch(step, inner, source, target, signed, arch))
        else:
            made.append(rows_launch(step, source, target, signed, arch))
    return tuple(made)


def per_element(launch: Launch, code: Compiled, gpu: GPU) -> float:
    """Instructions of threads per element of the tensor."""
    tiles = 1.0
    if launch.resident:
        count = TENSOR_BYTES / (launch.elements * launch.width / 2)
        tiles = max(1.0, count / (launch.resident * gpu.multiprocessors))
    return (code.per_tile + code.once / tiles) * code.threads / launch.elements


def seconds(launch: Launch, code: Compiled, gpu: GPU) -> dict[str, float]:
    """Time per element that memory, issue and products each need alone."""
    issue = per_element(launch, code, gpu) / (gpu.multiprocessors * gpu.hertz * LANES)
    products = code.products * sum(dot.operations for dot in launch.dots) / launch.elements
    # Without a fused form, a float64 product and its sum take the place of a fused one each.
    rate = gpu.flops64 / 4 if code.unit.startswith("D") else gpu.flops16 / 2
    return {
        "memory": launch.width / (COPY * gpu.bytes_per_second),
        "issue": issue,
        "products": products / rate,
    }


def predict(passes: Sequence[tuple[Launch, Compiled]], width: int, gpu: GPU) -> dict[str, Any]:
    """Percentage of the speed of a copy, what binds the slowest pass, and the load of each unit.

    A load near 100 % of a unit that does not bind is a warning: no unit is ever fully busy.
    """
    times = [seconds(launch, code, gpu) for launch, code in passes]
    slowest = max(times, key=lambda t: max(t.values()))
    total = sum(max(t.values()) for t in times)
    return {
        "percent_of_copy": round(100 * width / (COPY * gpu.bytes_per_second) / total, 1),
        "bound": max(slowest, key=lambda unit: slowest[unit]),
        "load": {unit: round(sum(t[unit] for t in times) / total, 3) for unit in slowest},
    }


def row(n: int, dtype: str, dim: int, signs: bool, arch: str) -> dict[str, Any]:
    """One line of the table, with its passes."""
    passes = [(x, compile_launch(x)) for x in launches(n, DTYPES[dtype], dim, signs, arch)]
    codes = [code for _, code in passes]
    gpus = [gpu for gpu in GPUS if gpu.arch == arch]
    width = 2 * DTYPES[dtype].itemsize
    return {
        "n": n,
        "dtype": dtype,
        "along": "last" if dim else "first",
        "signs": signs,
        "arch": arch,
        "bytes_per_element": sum(launch.width for launch, _ in passes),
        "instructions_per_element": round(
            sum(per_element(launch, code, gpus[-1]) for launch, code in passes), 1
        ),
        "registers": max(code.registers for code in codes),
        "spills": sum(code.spills for code in codes),
        "shared_bytes": max(code.shared for code in codes),
        "predicted": {gpu.name: predict(passes, width, gpu) for gpu in gpus},
        "passes": [
            {"kernel": launch.kernel.__name__, "elements_per_tile": launch.elements, **asdict(code)}
            for launch, code in passes
        ],
    }


def loads(load: dict[str, float]) -> str:
    """How busy the units are, but for memory."""
    return ", ".join(f"{unit} {share:.2f}" for unit, share in load.items() if unit != "memory")


def line(entry: dict[str, Any]) -> str:
    """A row as Markdown."""
    predicted = entry["predicted"].values()
    cells = [
        *(entry["n"], entry["dtype"], entry["along"], len(entry["passes"])),
        *(entry["bytes_per_element"], f"{entry['instructions_per_element']:.1f}"),
        *(entry["registers"], entry["spills"], f"{entry['shared_bytes'] / 1024:.0f}"),
        *(f"{p['percent_of_copy']:.0f} % ({p['bound']}; {loads(p['load'])})" for p in predicted),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def header(arch: str) -> str:
    """The head of the table of an architecture."""
    columns = [
        *("n", "dtype", "dimension", "passes", "bytes/element", "instructions/element"),
        *("registers", "spills", "shared KiB"),
        *(f"{gpu.name} of copy (bound; loads)" for gpu in GPUS if gpu.arch == arch),
    ]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> None:
    """Print the tables, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--arch", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--first", action="store_true", help="also along the first dimension")
    parser.add_argument("--signs", action="store_true", help="with random signs")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    arguments = parser.parse_args()
    import triton

    print(f"Predicted from machine code, not measured (Triton {triton.__version__}).")
    rows = []
    for arch in arguments.arch:
        print(f"\n{arch}\n\n{header(arch)}")
        for dim in (-1, 0) if arguments.first else (-1,):
            for dtype in arguments.dtypes:
                for n in sorted(arguments.sizes):
                    rows.append(row(n, dtype, dim, arguments.signs, arch))
                    print(line(rows[-1]), flush=True)
    if arguments.json:
        facts = {
            "kind": "prediction",
            "triton": triton.__version__,
            "copy_share": COPY,
            "gpus": [asdict(gpu) for gpu in GPUS],
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: unset it, as this compiles")
    main()
