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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compiled import BACKENDS, Compiled, Launch, compile_launch
from gpus import COPY, GPU, GPUS, per_element, seconds, tightest
from launches import DTYPES, transform
from measure.cases import SIZES


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
    launches = transform(n, DTYPES[dtype], dim, arch, "signs" * signs)
    passes = [(launch, compile_launch(launch)) for launch in launches]
    codes = [code for _, code in passes]
    instructions = sum(per_element(launch, code, tightest(arch)) for launch, code in passes)
    width = 2 * DTYPES[dtype].itemsize
    return {
        "n": n,
        "dtype": dtype,
        "along": "last" if dim else "first",
        "signs": signs,
        "arch": arch,
        "bytes_per_element": sum(launch.width for launch in launches),
        "instructions_per_element": round(instructions, 1),
        "registers": max(code.registers for code in codes),
        "spills": sum(code.spills for code in codes),
        "shared_bytes": max(code.shared for code in codes),
        "predicted": {gpu.name: predict(passes, width, gpu) for gpu in GPUS if gpu.arch == arch},
        "passes": [
            {
                "kernel": launch.name,
                "bytes_per_element": launch.width,
                "instructions_per_element": round(per_element(launch, code, tightest(arch)), 1),
                "unit": code.unit,
                "products_over_needed": round(code.products, 3),
            }
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
