"""Times launch configurations of the rows kernel on a GPU, to choose those that are shipped.

    python benchmarks/tune.py --out tuned.json

Every candidate is compiled first, in parallel; one that spills, or of which the intended programs
do not fit a multiprocessor, is left out. The rest are checked against float64 and timed on tensors
of 256 MB. The table `CONFIGS` of `fastrot/kernels/gpu_tiles.py` is what came of it.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gates import MULTIPROCESSORS
from launches import DTYPES

from fastrot.hadamard import factors
from fastrot.kernels.gpu_tiles import Config, Tile, product, tile_for

CASES = [
    *((n, "bf16") for n in (4096, 14336, 128, 8192, 16384, 1024, 32768, 11008)),
    *((n, "fp32") for n in (4096, 16384, 8192, 14336, 1024, 32768)),
]
ARCHITECTURES = {8: ("sm_80", "ampere"), 9: ("sm_90", "hopper"), 10: ("sm_100", "blackwell")}
LEAST, MOST = 16, 128
"""Elements of a tile for each thread."""


class Case(NamedTuple):
    """A candidate for vectors of length n."""

    n: int
    dtype: str
    tile: Tile


def whole(size: int, piece: int) -> bool:
    """Whether a tile is made of such pieces; without a piece its size is a power of two."""
    return size % piece == 0 and size > piece if piece else size & (size - 1) == 0


def candidates(tile: Tile) -> list[Tile]:
    """Launches of a cut, persistent ones with one program: how many fit is seen when compiled."""
    alone = product(tile.left_bases, tile.left_power) == 1
    found = [tile]
    for A, warps in itertools.product((64, 128, 256) if alone else (tile.A,), (4, 8)):
        elements = A * tile.B
        if not LEAST <= elements // (32 * warps) <= MOST:
            continue
        launches = [(0, 1, stages) for stages in (1, 2, 3, 4)]
        if A > 128 and not alone:
            launches += [(0, 0, stages) for stages in (2, 3)]
        elif elements >= 16384:
            launches += itertools.product((32, 64), (0, 1), (2, 3))
        for block, resident, stages in launches:
            pieces = itertools.product((0, 64), (0, 32, 64)) if resident and not block else [(0, 0)]
            for rows, columns in pieces:
                if whole(A, rows) and whole(tile.B, columns):
                    config = Config(warps, block, resident, stages, rows, columns)
                    found.append(
                        replace(tile, config=config, A=A, copies=A if alone else tile.copies)
                    )
    return found


def run(case: Case, x: torch.Tensor, out: torch.Tensor) -> Any:
    """One launch; returns the compiled kernel."""
    from fastrot.kernels.gpu import _multiprocessors
    from fastrot.kernels.gpu_rows import launch_rows

    return launch_rows(x, out, None, case.n**-0.5, False, case.tile, _multiprocessors(x.device))


def programs(case: Case, arch: str) -> int:
    """How many programs fit a multiprocessor, 0 for what spills or fails. Fills Triton's cache."""
    x = torch.zeros(2, case.n, dtype=DTYPES[case.dtype], device="cuda")
    try:
        made = run(case, x, x)
    except Exception:
        return 0
    if made.n_spills:
        return 0
    warps = case.tile.config.num_warps
    return MULTIPROCESSORS[arch].programs(made.n_regs, made.metadata.shared, warps)


def timed(case: Case) -> dict[str, Any]:
    """Milliseconds of a candidate, and its error over that of correct rounding."""
    from measure.cases import large
    from measure.oracle import transformed
    from triton.testing import do_bench

    x = torch.randn(large(case.n, case.dtype), case.n, dtype=DTYPES[case.dtype], device="cuda")
    out = torch.full_like(x, float("nan"))
    run(case, x, out)
    truth = transformed(x[-256:], None)
    error = (out[-256:].double() - truth).norm() / truth.norm() / torch.finfo(x.dtype).eps
    ms = do_bench(lambda: run(case, x, out), warmup=4, rep=20, return_mode="median")
    return {
        "n": case.n,
        "dtype": case.dtype,
        "tile": [case.tile.A, case.tile.B],
        "config": list(case.tile.config),
        "ms": ms,
        "error_eps": error.item() if out.isfinite().all() else None,
    }


def main() -> None:
    """Compile, time, print the best of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tuned.json"))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--processes", type=int, default=14)
    arguments = parser.parse_args()
    arch, backend = ARCHITECTURES[torch.cuda.get_device_capability()[0]]
    deadline = time.monotonic() + arguments.seconds
    made = []
    for n, dtype in CASES:
        tile = tile_for(*factors(n), DTYPES[dtype], DTYPES[dtype], backend)
        if tile is not None:
            made += [Case(n, dtype, t) for t in candidates(tile)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        fitting = list(pool.map(programs, made, [arch] * len(made)))
    results = []
    for case, most in zip(made, fitting, strict=True):
        shipped = case.tile.config.resident
        counts = sorted({most, max(1, most // 2)}) if shipped else [0]
        if case.tile == tile_for(*factors(case.n), *[DTYPES[case.dtype]] * 2, backend):
            counts = [shipped]
        for resident in counts if most else []:
            if time.monotonic() > deadline:
                break
            tile = replace(case.tile, config=case.tile.config._replace(resident=resident))
            results.append(timed(case._replace(tile=tile)))
            arguments.out.write_text(json.dumps(results) + "\n")
    for n, dtype in CASES:
        rows = [r for r in results if (r["n"], r["dtype"]) == (n, dtype)]
        if rows:
            print(n, dtype, "shipped", f"{1e3 * rows[0]['ms']:.1f} us", rows[0]["error_eps"])
        for r in sorted(rows, key=lambda r: r["ms"])[:3]:
            print("   ", r["tile"], r["config"], f"{1e3 * r['ms']:.1f} us", r["error_eps"])


if __name__ == "__main__":
    main()
