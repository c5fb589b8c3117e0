"""The CPU kernels against a copy of the same tensor, and against fht_cpu where it is installed.

Transforms of tensors of 64 MB along the last dimension, in place and into another tensor, and along
the first, in place; the weight pass in place. Every round times ``y.copy_(x)`` and all others once,
so that a change of the machine's speed meets all. All memory has been touched before.

    pip install fht_cpu
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

try:
    import fht_cpu
except ImportError:
    fht_cpu = None

POWERS = tuple(1 << log for log in range(6, 17))
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


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, and multiples of the first: median, 10th and 90th percentile."""
    for run in runs.values():
        run()
    times = [{name: timed(run) for name, run in runs.items()} for _ in range(rounds)]
    base = sorted(each[next(iter(runs))] for each in times)[rounds // 2]
    found = {}
    for name in runs:
        low, middle, high = (
            sorted(each[name] for each in times)[rounds * tenths // 10] for tenths in (1, 5, 9)
        )
        ratios = {"median": middle / base, "p10": low / base, "p90": high / base}
        found[name] = {"ms": middle * 1e3, **ratios}
    return found


def peer(x: Tensor) -> Callable[[], Any] | None:
    """fht_cpu in place on as many threads, if it is installed and can do this."""
    power = x.shape[-1] & (x.shape[-1] - 1) == 0
    if fht_cpu is None or not power or x.dtype not in (torch.float32, torch.float64):
        return None
    array, threads = x.numpy(), torch.get_num_threads()
    return lambda: fht_cpu.fht(array, num_threads=threads)


def transform_row(n: int, dtype: torch.dtype, bytes_: int, rounds: int) -> dict[str, Any]:
    """Transforms of ``(vectors, n)`` along dimension -1, and of ``(n, vectors)`` along 0."""
    vectors = -(-bytes_ // (n * dtype.itemsize) // 64) * 64
    x = torch.randn(vectors, n).to(dtype)
    y, columns, scale = torch.empty_like(x), x.clone().view(n, vectors), n**-0.5
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: y.copy_(x),
        "in place": lambda: hadamard_transform(x, scale, out=x),
        "other": lambda: hadamard_transform(x, scale, out=y),
        "first": lambda: hadamard_transform(columns, scale, dim=0, out=columns),
    }
    # It does not scale, so that numbers would grow beyond all bounds from round to round.
    other = peer(torch.zeros_like(x))
    if other is not None:
        runs["fht_cpu in place"] = other
    y.copy_(x)
    return {"kernel": "transform", "n": n, "dtype": str(dtype)[6:], **measure(runs, rounds)}


def operator_row(rows: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds of a call of the operator on few rows: median, 10th and 90th percentile."""
    x, calls, seconds = torch.randn(rows, n).to(dtype), 200, []
    with torch.no_grad():
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(calls):
                hadamard_transform(x, n**-0.5)
            seconds.append((time.perf_counter() - start) / calls * 1e6)
    seconds.sort()
    found = {"median": seconds[25], "p10": seconds[5], "p90": seconds[45]}
    return {"kernel": "operator", "n": n, "rows": rows, "dtype": str(dtype)[6:], "us": found}


def weight_row(name: str, dtype: torch.dtype, compute: torch.dtype, rounds: int) -> dict[str, Any]:
    """One weight pass in place."""
    shape, left, right, folded = WEIGHTS[name]
    w = torch.randn(shape).to(dtype)
    y = w.clone()
    gamma = torch.rand(shape[1]) + 0.5 if folded else None
    sides = [Side(n, torch.randint(0, 2, (n,)) * 2.0 - 1) if n else None for n in (left, right)]

    def run() -> None:
        rotate_matrix(w, w, left=sides[0], right=sides[1], gamma=gamma, dtype=compute)

    runs = {"copy": lambda: y.copy_(w), "in place": run}
    kernel = f"{name} in {str(compute)[6:]}"
    return {"kernel": kernel, "n": shape[1], "dtype": str(dtype)[6:], **measure(runs, rounds)}


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
    rows = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{row['kernel']:30}{row['n']:7} {row['dtype']:9}", end="")
        if "us" in row:
            print(f"{row['rows']:4} rows {row['us']['median']:.1f} us")
            return
        print(f"copy {row['copy']['ms']:7.2f} ms", end="")
        for name in [*row][4:]:
            print(f"   {name} {row[name]['median']:5.2f}", end="")
        print("  (x copy)", flush=True)

    size = arguments.megabytes << 20
    for rows_, n in ((1, 1536), (1, 576), (16, 1536)):
        for name in arguments.dtypes:
            show(operator_row(rows_, n, DTYPES[name]))
    for name in arguments.dtypes:
        for n in arguments.sizes:
            show(transform_row(n, DTYPES[name], size, arguments.rounds))
        for weight in WEIGHTS:
            for compute in (torch.float64, torch.float32):
                show(weight_row(weight, DTYPES[name], compute, arguments.rounds))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
