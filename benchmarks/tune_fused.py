"""Times launch configurations of the fused kernels on a GPU, to choose those that are shipped.

    python benchmarks/tune_fused.py --out tuned-fused.json --seconds 100

As `tune.py`: candidates are compiled first, in parallel, those that spill are left out, the rest
are timed on tensors of 256 MB. A result is held to that of the shipped configuration, bit for bit;
what differs is written beside the time. `--offline` only compiles them all, on any machine.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from compiled import Dot, Launch, compile_launch
from gates import MULTIPROCESSORS
from measure.cases import case as job_of
from measure.cases import large
from measure.jobs import make
from measure.operator import Data
from measure.operators import OPERATORS
from tune import ARCHITECTURES, LEAST, MOST

from fastrot.kernels import gpu_fused_launch, gpu_rope_launch
from fastrot.kernels.gpu_fused_tiles import Cut, FusedTile, fused_tile, fused_tiles
from fastrot.kernels.gpu_tiles import Config

CASES = (
    *(("fp8", n) for n in (4096, 14336, 8192)),
    *(("mxfp4", n) for n in (4096, 14336)),
    *(("SiLU, fp8", n) for n in (14336, 8192)),
    *((f"{name}, blocks", 4096) for name in ("fp8", "mxfp4", "nvfp4", "RMSNorm, fp8")),
    ("int8", 4096),
    ("SiLU", 8192),
    ("RoPE", 4096),
)
"""Operators of `measure`, the most important first, and sizes of tokens."""

NO_LOOP = 1 << 20
"""Programs per multiprocessor of a RoPE launch that has one for each tile."""

FEW = 64
"""Tokens of a launch that only compiles; their number and `large` have 64 in common."""


class Case(NamedTuple):
    """A candidate; without a configuration it is what the library launches now."""

    operator: str
    n: int
    rows: int = 0
    config: Config | None = None
    tile: FusedTile | None = None
    """None for RoPE."""


@dataclass
class Call:
    """A launch as the library makes it, which has not happened yet, and the result it fills."""

    kernel: Any
    grid: Any = None
    arguments: tuple[Any, ...] = ()
    constants: dict[str, Any] | None = None
    output: Any = None
    cut: Cut | None = None
    tile: FusedTile | None = None

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """In place of the kernel."""

        def keep(*arguments: Any, **constants: Any) -> None:
            self.grid, self.arguments, self.constants = grid, arguments, constants

        return keep

    def launch(self) -> Any:
        """Returns the compiled kernel."""
        return self.kernel[self.grid](*self.arguments, **self.constants)

    def described(self) -> Launch:
        """To compile it without a device."""
        names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8"}
        named = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        types = {k: "fp32" for k, v in named.items() if isinstance(v, float)}
        tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
        types |= {k: f"*{names.get(v.dtype, 'u8')}" for k, v in tensors.items()}
        return Launch(
            name="",
            kernel=self.kernel,
            types=types,
            integers={k: v for k, v in named.items() if isinstance(v, int)},
            constants=self.constants or {},
            arch="sm_90",
            elements=1,
            width=1,
            dots=(Dot(64, 64, 64, 1),),
            trips=1,
            resident=1,
        )


@contextmanager
def configured(case: Case) -> Iterator[Call]:
    """Inside, the library launches the candidate, into the call."""
    rope, config = case.operator == "RoPE", case.config
    module = gpu_rope_launch if rope else gpu_fused_launch
    name = "_rope_kernel" if rope else "_fused_kernel"
    call = Call(getattr(module, name))
    changed: dict[str, Any] = {name: call}

    def chosen(cut: Cut) -> FusedTile | None:
        call.cut, call.tile = cut, case.tile or fused_tile(cut)
        return call.tile

    if not rope:
        changed["fused_tile"] = chosen
    elif config is not None:
        own = config._replace(resident=config.resident or NO_LOOP)
        changed |= {"ROWS": case.rows, "rope_config": lambda *_: own}
    if not torch.cuda.is_available():
        changed |= {"_check": lambda x: None, "backend_of": lambda device: "hopper"}
    with ExitStack() as stack:
        for key, value in changed.items():
            stack.enter_context(patch.object(module, key, value))
        yield call


def captured(case: Case, rows: int) -> Call:
    """The candidate's launch on tokens; what divides their number decides the machine code."""
    with configured(case) as call:
        call.output = OPERATORS[case.operator].call(inputs(case.operator, case.n, rows))
    return call


@lru_cache(maxsize=1)
def inputs(operator: str, n: int, rows: int) -> Data:
    """The inputs of an operator, as the benchmark has them."""
    if torch.cuda.is_available():
        return make(job_of(operator, n, rows, "bf16"), OPERATORS[operator].inputs)
    shape = rows, n
    x = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(OPERATORS[operator].inputs)]
    return Data(tuple(x), None, -1)


def candidates(operator: str, n: int) -> list[Case]:
    """The shipped launch, then others; of those in a loop, how many fit is seen when compiled."""
    case = Case(operator, n)
    found = [case]
    if operator == "RoPE":
        loops = [(1, 1), (1, 2), (1, 3), (1, 4), (0, 1)]
        for rows, block, warps, loop in product((64, 128), (64, 128), (4, 8), loops):
            found.append(Case(operator, n, rows, Config(warps, block, *loop)))
        return found
    call = captured(case, FEW)
    assert call.cut is not None, case
    assert call.tile is not None, case
    cuts = sorted(fused_tiles(call.cut), key=lambda pair: (pair[1] != call.tile, pair[0]))
    for place, (cost, tile) in enumerate(cuts[:3]):
        if cost > 1.7 * cuts[0][0]:
            continue
        taller = [a for a in (tile.A, 2 * tile.A) if a <= (256 if tile.a == 1 else 128)]
        for A in (taller if place == 0 else [tile.A]) if tile.A <= 128 else [tile.A]:
            for warps in (4, 8):
                most = MOST if tile.a == 1 else MOST // 2  # two products spill earlier
                if not LEAST <= A * tile.B // (32 * warps) <= most:
                    continue
                for block, resident, stages in launches(tile, A, place == 0):
                    config = Config(warps, block, resident, stages)
                    if not block:
                        rows, columns = tile.config.rows, tile.config.columns
                        config = config._replace(rows=rows, columns=columns)
                    made = replace(tile, A=A, tokens=A // tile.token_rows, config=config)
                    found.append(Case(operator, n, A, config, made))
    return found


def launches(tile: FusedTile, A: int, first: bool) -> list[tuple[int, int, int]]:
    """Columns at a time, whether in a loop, and stages; fewer for any but the shipped cut."""
    if tile.config.rows:
        return [(0, 1, stages) for stages in (1, 2, 3)]
    if A > 128 and tile.a > 1:  # the left matrix is loaded in parts
        return [(0, 0, stages) for stages in ((1, 2, 3, 4) if first else (2, 3))]
    made = [(0, 1, stages) for stages in ((1, 2, 3, 4) if first else (2, 3))] + [(0, 0, 1)]
    if A * tile.B >= 16384:
        made += product((64,), (0, 1), (2, 3))
    return made


def compiled(case: Case, arch: str) -> tuple[int, str]:
    """How many programs fit a multiprocessor, and why it is none. Fills Triton's cache."""
    try:
        call = captured(case, FEW)
        warps = (call.constants or {})["num_warps"]
        if torch.cuda.is_available():
            made = call.launch()
            needs, spills = (made.n_regs, made.metadata.shared, warps), made.n_spills
        else:
            code = compile_launch(call.described())
            needs, spills = (code.registers, code.shared, warps), code.spills
    except Exception as error:
        return 0, f"{type(error).__name__}: {error}"[:200]
    if spills:
        return 0, "spills"
    return MULTIPROCESSORS[arch].programs(*needs), ""


def timed(case: Case, reference: list[torch.Tensor] | None) -> dict[str, Any]:
    """Microseconds of a candidate, and the share of its bytes that differ from the reference."""
    from triton.testing import do_bench

    call = captured(case, large(case.n, "bf16"))
    for tensor in flat(call.output):
        tensor.fill_(85)
    call.launch()
    differ = None
    if reference is not None:
        pairs = zip(flat(call.output), reference, strict=True)
        differ = max((a != b).count_nonzero().item() / a.numel() for a, b in pairs)
    us = 1e3 * do_bench(call.launch, warmup=4, rep=20, return_mode="median")
    c = call.constants or {}
    config = case.config or (call.tile.config if call.tile else None)
    resident = call.grid[0] / torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "operator": case.operator,
        "n": case.n,
        "tile": [c["A"], c["B"], c.get("TOKENS", 0)],
        "block": c["BLOCK"],
        "num_warps": c["num_warps"],
        "num_stages": c["num_stages"],
        "resident": config.resident if config else round(resident),
        "us": us,
        "differ": differ,
    }


def flat(output: Any) -> list[torch.Tensor]:
    """The bytes of a result."""
    return [t.view(torch.uint8) for t in ((output,) if torch.is_tensor(output) else output)]


def resident(case: Case, most: int) -> Iterator[Case]:
    """The candidate with as many programs as fit, and with half of them."""
    if case.config is None or not case.config.resident:
        yield case
        return
    for count in sorted({most, max(1, most // 2)}):
        config = case.config._replace(resident=count)
        tile = replace(case.tile, config=config) if case.tile else None
        yield case._replace(config=config, tile=tile)


def compile_all(cases: list[Case], arch: str, processes: int, deadline: float) -> list[Any]:
    """What `compiled` says of each, None of those that the deadline leaves out."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    futures = [pool.submit(compiled, case, arch) for case in cases]
    done = wait(futures, max(0.0, deadline - time.monotonic())).done
    pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() if future in done else None for future in futures]


def summary(results: list[dict[str, Any]]) -> None:
    """Each case's shipped launch, and the best three."""
    for operator, n in CASES:
        rows = [r for r in results if (r["operator"], r["n"]) == (operator, n)]
        if rows:
            print(operator, n, "shipped", *words(rows[0]))
        for r in sorted(rows, key=lambda r: r["us"])[:3]:
            print("   ", *words(r))


def words(r: dict[str, Any]) -> Iterator[str]:
    """A result in a line."""
    yield f"{r['us']:.1f} us: {r['tile']}"
    yield from (f"{key} {r[key]}" for key in ("block", "num_warps", "resident", "num_stages"))
    if r["differ"]:
        yield f"DIFFERS in {r['differ']:.2g}"


def main() -> None:
    """Compile, time, print the best of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tuned-fused.json"))
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--offline", action="store_true", help="compile for sm_90, time nothing")
    arguments = parser.parse_args()
    start = time.monotonic()
    arch = "sm_90"
    if not arguments.offline:
        arch, _ = ARCHITECTURES[torch.cuda.get_device_capability()[0]]
    cases = [case for operator, n in CASES for case in candidates(operator, n)]
    share = 1e6 if arguments.offline else 0.6 * arguments.seconds
    made = compile_all(cases, arch, arguments.processes, start + share)
    known = [pair for pair in made if pair is not None]
    print(f"{len(cases)} candidates, {len(known)} compiled in {time.monotonic() - start:.0f} s")
    for why, count in Counter(word for _, word in known if word).most_common():
        print("   ", count, why)
    if arguments.offline:
        for operator, n in CASES:
            mine = [
                pair for case, pair in zip(cases, made, strict=True) if case[:2] == (operator, n)
            ]
            fit = sum(most > 0 for most, _ in mine)
            print(f"{operator} {n}: {fit} of {len(mine)} fit, shipped: {mine[0]}")
        return
    results: list[dict[str, Any]] = []
    reference: list[torch.Tensor] | None = None
    for case, pair in zip(cases, made, strict=True):
        if case.config is None:
            call = captured(case, large(case.n, "bf16"))
            call.launch()
            reference = flat(call.output)
        for one in resident(case, pair[0]) if pair and pair[0] else ():
            if time.monotonic() > start + arguments.seconds:
                break
            try:
                results.append(timed(one, reference))
            except Exception as error:
                print(one, f"{type(error).__name__}: {error}"[:200])
            arguments.out.write_text(json.dumps(results) + "\n")
    summary(results)


if __name__ == "__main__":
    main()
