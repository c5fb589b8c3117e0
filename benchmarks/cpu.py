"""The CPU kernels against ``torch.clone`` of the same tensor.

Transforms of tensors of 64 MB along the last and the first dimension, and the weight pass in place.
Every round times a clone and then the kernel, both into fresh memory (the weight pass: in place),
so that a change of the machine's speed meets both.

    python benchmarks/cpu.py --json benchmarks/results/cpu.json
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from fastrot.kernels import hadamard_transform
from fastrot.kernels.cpu_weight import rotate_matrix
from fastrot.kernels.weight import Side

POWERS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
OTHERS = (3072, 7168, 9216, 11008, 13824, 14336, 18944)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WEIGHTS = {
    "gate, right": ((8192, 2048), None, 2048, True),
    "value, both": ((512, 2048), 64, 2048, True),
    "output, both": ((2048, 2048), 2048, 64, False),
    "down, left": ((2048, 8192), 2048, None, False),
    "down, both": ((2048, 8192), 2048, 8192, False),
    "embedding, right": ((32000, 2048), None, 2048, False),
}
"""Name: shape, left size, right size, whether a norm is folded in (a Llama of hidden size 2048)."""


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call, its result freed after the clock has stopped."""
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def measure(run: Callable[[], Any], x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds and multiples of a clone: median, 10th and 90th percentile."""
    run()
    pairs = [(timed(x.clone), timed(run)) for _ in range(rounds)]
    clones, runs = (sorted(column) for column in zip(*pairs, strict=True))
    clone = clones[rounds // 2]
    median, low, high = (runs[rounds * tenths // 10] for tenths in (5, 1, 9))
    return {
        "clone_ms": clone * 1e3,
        "median_ms": median * 1e3,
        "ns_per_element": median * 1e9 / x.numel(),
        "median": median / clone,
        "p10": low / clone,
        "p90": high / clone,
    }


def transform_row(n: int, dim: int, dtype: torch.dtype, bytes_: int, rounds: int) -> dict[str, Any]:
    """One transform of ``(vectors, n)`` along ``dim`` −1, or of ``(n, vectors)`` along 0."""
    vectors = -(-bytes_ // (n * dtype.itemsize) // 64) * 64
    x = torch.randn((vectors, n) if dim else (n, vectors)).to(dtype)
    figures = measure(lambda: hadamard_transform(x, n**-0.5, dim=dim, impl="cpu"), x, rounds)
    where = "last" if dim else "first"
    return {"kernel": f"transform, {where}", "n": n, "dtype": str(dtype)[6:], **figures}


def weight_row(name: str, dtype: torch.dtype, compute: torch.dtype, rounds: int) -> dict[str, Any]:
    """One weight pass in place."""
    shape, left, right, folded = WEIGHTS[name]
    w = torch.randn(shape).to(dtype)
    gamma = torch.rand(shape[1]) + 0.5 if folded else None
    sides = [Side(n, torch.randint(0, 2, (n,)) * 2.0 - 1) if n else None for n in (left, right)]

    def run() -> None:
        rotate_matrix(w, w, left=sides[0], right=sides[1], gamma=gamma, dtype=compute)

    figures = measure(run, w, rounds)
    kernel = f"{name} in {str(compute)[6:]}"
    return {"kernel": kernel, "n": shape[1], "dtype": str(dtype)[6:], **figures}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[*POWERS, *OTHERS])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    facts = machine()
    print(json.dumps(facts, indent=1))
    print(f"{'kernel':30}{'n':>7} {'dtype':9}{'clone ms':>9}{'ms':>8}{'ns/el':>7}", end="")
    print(f"{'median':>8}{'p10':>7}{'p90':>7}  (× clone)")
    rows = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{row['kernel']:30}{row['n']:7} {row['dtype']:9}{row['clone_ms']:9.2f}", end="")
        print(f"{row['median_ms']:8.2f}{row['ns_per_element']:7.2f}", end="")
        print(f"{row['median']:8.2f}{row['p10']:7.2f}{row['p90']:7.2f}", flush=True)

    size = arguments.megabytes << 20
    for name in arguments.dtypes:
        for n in arguments.sizes:
            for dim in (-1, 0):
                show(transform_row(n, dim, DTYPES[name], size, arguments.rounds))
        for weight in WEIGHTS:
            for compute in (torch.float64, torch.float32):
                show(weight_row(weight, DTYPES[name], compute, arguments.rounds))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
