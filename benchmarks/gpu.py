"""The GPU kernels against float64 and against a copy: one command, one JSON, within nine minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu-h200.json

Every case is checked before it is timed, and one that fails, hangs or takes its process along is
recorded and left behind. The most important cases come first; what the time does not reach is
recorded as skipped. `--interpret` walks through all of it on a CPU, with tiny sizes, in Triton's
interpreter: its times mean nothing. `report.py` makes plots and a table from the file.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Job = dict[str, Any]
Run = Callable[[], Any]

MAIN = (4096, 14336, 8192, 128, 1024, 11008, 16384, 32768)
"""The sizes that matter most: heads, hidden and intermediate sizes, and the bounds we promise."""

SIZES = (
    *MAIN,
    *(64, 256, 512, 2048, 65536, 13824, 18944, 29568, 10944, 9728, 27648, 53248, 2880, 3072),
)
ROWS = (16, 256, 4096, 65536)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

TENSOR_BYTES = 256 << 20
"""Of the tensors that show bandwidth, several times any cache."""

MAX_BYTES = 4 << 30
OPTIONAL = ("fast_hadamard_transform", "faster_hadamard_transform", "vllm", "llmcompressor")
DENSE_OPERATIONS = 8e12
"""A dense product with more than that is left out."""

BUDGET = {"bf16": 1.1, "fp16": 1.5}
"""Admissible RMS error, in errors of correct rounding."""

ULPS = 4
"""Admissible error of a float32 vector, in ulps of its norm."""

LOGITS = 1e-5
"""Admissible relative logit error of a rotated float32 model."""

LIMIT = {"apply": 120.0, "llm-compressor": 120.0}
"""Seconds until a job's process is ended; 60 for all others."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SMALLER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {"Llama 8B": LLAMA_8B, "Llama 1B": LLAMA_8B | SMALLER, "tiny": LLAMA_8B | TINY}


# What a transform should give, and who else gives it.


@cache
def halves(n: int) -> tuple[Tensor, Tensor]:
    """P and Q of similar order, float64, with H_n = P ⊗ Q."""
    import numpy as np

    from fastrot.hadamard import base_matrix, factors

    bases, power = factors(n)
    atoms = [*bases, *[2] * (power.bit_length() - 1)]
    first, second = np.ones((1, 1)), np.ones((1, 1))
    while atoms:
        if len(first) <= len(second):
            first = np.kron(first, base_matrix(atoms.pop(0)))
        else:
            second = np.kron(base_matrix(atoms.pop()), second)
    return torch.from_numpy(first).to(DEVICE), torch.from_numpy(second).to(DEVICE)


def truth(rows: Tensor, signs: Tensor | None) -> Tensor:
    """The orthonormal transform of vectors in rows, in float64, by dense products."""
    p, q = halves(rows.shape[1])
    x = rows.double() if signs is None else rows.double() * signs.double()
    y = p.T @ x.view(-1, len(p), len(q)) @ q
    return y.reshape(rows.shape) * rows.shape[1] ** -0.5


@cache
def hadacore() -> Callable[[Tensor], Tensor] | None:
    """HadaCore's transform, from its own package or vLLM's."""
    if importlib.util.find_spec("faster_hadamard_transform"):
        module = importlib.import_module("faster_hadamard_transform")
        return lambda x: module.hadamard_transform(x, False)
    if importlib.util.find_spec("vllm"):
        module = importlib.import_module("vllm._custom_ops")
        return lambda x: module.hadacore_transform(x, False)
    return None


def peers(x: Tensor, signs: Tensor | None, dim: int) -> dict[str, Run]:
    """What else computes the same: dense, two smaller products in torch, other packages."""
    n = x.shape[dim]
    p, q = (half.to(x.dtype) for half in halves(n))
    q = q * n**-0.5  # rounded in 16 bits where n is no power of four
    found: dict[str, Run] = {}

    def two_products() -> Tensor:
        y = x if signs is None else x * (signs if dim else signs[:, None])
        if dim:
            return (p.T @ y.view(-1, len(p), len(q)) @ q).view(x.shape)
        y = (p.T @ y.view(len(p), -1)).view(len(p), len(q), -1)
        return (q.T @ y).view(x.shape)

    found["torch, two products"] = two_products
    if signs is not None:
        return found
    if 2 * n * x.numel() <= DENSE_OPERATIONS and n <= 16384:
        h = torch.kron(p, q)
        found["dense"] = (lambda: x @ h) if dim else (lambda: h.T @ x)
    if not dim:
        found["transposed copies"] = lambda: _transform(x.T.contiguous(), None, -1).T.contiguous()
    elif n & (n - 1) == 0 and n <= 32768 and not INTERPRETED:
        if importlib.util.find_spec("fast_hadamard_transform"):
            theirs = importlib.import_module("fast_hadamard_transform").hadamard_transform
            found["fast-hadamard-transform"] = lambda: theirs(x, n**-0.5)
        if x.dtype != torch.float32 and (tensor_cores := hadacore()):
            found["HadaCore"] = lambda: tensor_cores(x)
    return found


# Kernels: one to come is one more row.


def _transform(x: Tensor, signs: Tensor | None, dim: int) -> Tensor:
    from fastrot.kernels import hadamard_transform

    return hadamard_transform(x, x.shape[dim] ** -0.5, dim=dim, signs=signs, impl="triton")


def _in_place(x: Tensor, signs: Tensor | None, dim: int) -> Tensor:
    from fastrot.kernels.gpu import transform

    n = x.shape[dim]
    v = x.view(-1, n, 1 if dim else x.shape[1])
    transform(v, v, signs, n**-0.5, False)
    return x


@dataclass(frozen=True)
class Kernel:
    """One row: a kernel and what it is held to; fused ones say how their output reads."""

    call: Callable[[Tensor, Tensor | None, int], Any]
    written: float | None = None
    """Bytes written per element; None: as many as are read."""
    exact: Callable[[Tensor, Tensor | None], Tensor] = truth
    """In float64, from vectors in rows."""
    values: Callable[[Any], Tensor] = lambda output: output
    """The numbers in an output, in the shape of the input."""
    rounded: Callable[[Tensor, torch.dtype], Tensor] = lambda truth, dtype: truth.to(dtype)
    """The exact result after the one rounding that the output's format asks for."""
    peers: Callable[[Tensor, Tensor | None, int], dict[str, Run]] = peers


KERNELS = {"transform": Kernel(_transform), "in place": Kernel(_in_place)}


def errors(
    outputs: dict[str, Tensor], x: Tensor, signs: Tensor | None, dim: int, kernel: Kernel
) -> dict[str, Job]:
    """RMS error of each output over that of correct rounding; its largest error in ulps."""
    eps = torch.finfo(x.dtype).eps
    sums = {name: [0.0, 0.0] for name in outputs}
    rounding = 0.0
    step = max(1, (1 << 24) // x.shape[dim])
    for start in range(0, x.shape[1 + dim], step):

        def rows(t: Tensor, start: int = start) -> Tensor:
            part = t.narrow(1 + dim, start, min(step, t.shape[1 + dim] - start))
            return part if dim else part.T

        exact = kernel.exact(rows(x), signs)
        norms = exact.norm(dim=1) * eps
        rounding += (kernel.rounded(exact, x.dtype).double() - exact).square().sum().item()
        for name, output in outputs.items():
            error = rows(output).double() - exact
            sums[name][0] += error.square().sum().item()
            worst = (error.norm(dim=1) / norms).max().item()
            # max() alone would let a NaN pass.
            sums[name][1] = worst if worst != worst else max(sums[name][1], worst)
    return {
        name: {"error": (square / max(rounding, 1e-300)) ** 0.5, "ulps": ulps}
        for name, (square, ulps) in sums.items()
    }


# Jobs: each runs in the worker and answers with a dict.


def timed(run: Run, nbytes: int, moved: float) -> Job:
    """Median and 90th percentile; ``how`` tells what stands between the kernel and the clock."""
    if INTERPRETED:
        start = time.perf_counter()
        run()
        how, times = "interpreter", [1e3 * (time.perf_counter() - start)] * 2
    else:
        from triton.testing import do_bench, do_bench_cudagraph

        quantiles = (0.5, 0.9)
        if nbytes < 4 << 20:  # a launch from Python takes longer than the kernel
            how, times = "graph of many, warm L2", do_bench_cudagraph(run, quantiles=quantiles)
        elif nbytes < 128 << 20:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            how = "graph of one, flushed L2"
            times = do_bench(graph.replay, warmup=10, rep=60, quantiles=quantiles)
        else:
            how, times = "flushed L2", do_bench(run, warmup=10, rep=60, quantiles=quantiles)
    median, p90 = times
    return {"median_ms": median, "p90_ms": p90, "gb_per_s": moved / median / 1e6, "how": how}


def attempt(run: Callable[[], Job]) -> Job:
    """The answer, or the error in its place."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def kernel_job(job: Job) -> Job:
    """Check one case, then time it beside a clone and the peers."""
    kernel, dim, n = KERNELS[job["kernel"]], job["dim"], job["n"]
    generator = torch.Generator(DEVICE).manual_seed(n)
    shape = (job["rows"], n) if dim else (n, job["rows"])
    x = torch.randn(shape, dtype=DTYPES[job["dtype"]], device=DEVICE, generator=generator)
    signs = None
    if job["signs"]:
        bits = torch.randint(0, 2, (n,), device=DEVICE, generator=generator)
        signs = (2 * bits - 1).to(torch.int8)
    if job.get("warm"):
        kernel.call(x, signs, dim)
        return {"status": "ok"}
    copy = x.clone()
    # The allocator gives this block to the output: what the kernel leaves out is not a number.
    torch.full_like(x, float("nan"))
    outputs = {"ours": kernel.values(kernel.call(copy, signs, dim))}
    theirs = kernel.peers(x, signs, dim)
    failed = {}
    for name, run in theirs.items():
        answer = attempt(lambda run=run: {"output": run()})
        if "failed" in answer:
            failed[name] = answer
        else:
            outputs[name] = answer["output"]
    found = errors(outputs, x, signs, dim, kernel)
    outputs.clear()
    del copy
    ours = found["ours"]
    bound, limit = ("ulps", ULPS) if job["dtype"] == "fp32" else ("error", BUDGET[job["dtype"]])
    result = {**ours, "budget": limit, "status": "ok" if ours[bound] <= limit else "wrong"}
    if result["status"] == "wrong":
        return result

    def times() -> Job:
        moved = x.numel() * (x.itemsize + (kernel.written or x.itemsize))
        ours = timed(lambda: kernel.call(x, signs, dim), x.nbytes, moved)
        clone = timed(x.clone, x.nbytes, 2 * x.nbytes)
        percent = 100 * ours["gb_per_s"] / clone["gb_per_s"]
        return {**ours, "clone": clone, "percent_of_clone": percent}

    result |= attempt(times)
    result["peers"] = failed
    for name, run in theirs.items():
        if name not in failed:
            answer = attempt(lambda run=run: timed(run, x.nbytes, 2 * x.nbytes))
            result["peers"][name] = {**found[name], **answer}
    return result


def build(shape: Job, dtype: torch.dtype) -> Any:
    """A random model, on the device from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def rotation_seconds(shape: Job, rotate: Callable[[Any], Any]) -> Job:
    """Of one rotation of a new bf16 model, with the peak of memory."""
    gc.collect()
    model = build(shape, torch.bfloat16)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    rotate(model)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }


@torch.no_grad()
def apply_job(job: Job) -> Job:
    """`fastrot.apply`: exact on one float32 layer, then timed on the whole bf16 model."""
    import fastrot

    shape, rotations = MODELS[job["model"]], job["rotations"]
    small = {**shape, "num_hidden_layers": 1, "vocab_size": 512}
    model = build(small, torch.float32)
    tokens = torch.arange(32, device=DEVICE)[None]
    before = model(tokens).logits
    fastrot.apply(model, rotations)
    error = ((model(tokens).logits - before).norm() / before.norm()).item()
    status = "ok" if error <= LOGITS else "wrong"
    result: Job = {"logit_error": error, "budget": LOGITS, "status": status}
    del model, before
    rotation_seconds(small, lambda model: fastrot.apply(model, rotations))  # compiles
    for undo in ("auto", "none"):
        runs = [
            rotation_seconds(shape, lambda model, u=undo: fastrot.apply(model, rotations, undo=u))
            for _ in range(job["repeat"])
        ]
        seconds = sorted(run["seconds"] for run in runs)
        median = statistics.median(seconds)
        result[f"undo={undo}"] = {**runs[-1], "seconds": median, "all_seconds": seconds}
    return result


def peer_job(job: Job) -> Job:
    """The same by llm-compressor."""
    from llmcompressor.core import State
    from llmcompressor.modifiers.transform import SpinQuantModifier

    def rotate(model: Any) -> None:
        modifier = SpinQuantModifier(rotations=job["rotations"], transform_type="hadamard")
        state = State(model=model)
        modifier.on_initialize(state)
        modifier.on_calibration_start(state, None)

    return {"status": "ok", **rotation_seconds(MODELS[job["model"]], rotate)}


def machine_job(_: Job) -> Job:
    """What the figures depend on."""
    facts: Job = {"gpu": None, "driver": None}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
        answer = attempt(lambda: {"smi": subprocess.check_output(command, text=True).strip()})
        if "smi" in answer:
            values = answer["smi"].split(", ")
            facts |= dict(
                zip(("driver", "sm_clock", "memory_clock", "power"), values, strict=False)
            )
    import fastrot

    versions = {"fastrot": fastrot.__version__, "cuda": torch.version.cuda}
    for name in ("torch", "triton", "numpy", "transformers", *OPTIONAL):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"status": "ok", **facts, "python": platform.python_version(), **versions}


JOBS = {
    **dict.fromkeys(KERNELS, kernel_job),
    "apply": apply_job,
    "llm-compressor": peer_job,
    "machine": machine_job,
}


def import_fastrot() -> None:
    """Without psutil too: it is asked about a computer's memory, never about a GPU's."""
    missing = importlib.util.find_spec("psutil") is None
    if missing:
        from transformers import LlamaForCausalLM  # noqa: F401  (would find the stand-in)

        sys.modules["psutil"] = ModuleType("psutil")
    import fastrot  # noqa: F401

    if missing:
        del sys.modules["psutil"]


def do(job: Job) -> Job:
    """One job, in this process."""
    import_fastrot()
    return JOBS[job["kernel"]](job)


def serve(connection: Any) -> None:
    """A worker: answers jobs until its process ends."""
    if INTERPRETED:
        torch.set_num_threads(1)
    while True:
        job = connection.recv()
        answer = attempt(lambda job=job: do(job))
        gc.collect()
        if DEVICE == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # after an illegal access nothing works any more
                answer = {"failed": str(error)[:500], "fatal": True}
        connection.send(answer | ({"status": "error"} if "failed" in answer else {}))


class Worker:
    """A process that can fail alone."""

    def __init__(self, target: Callable[[Any], None]):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def ask(self, job: Job, seconds: float) -> Job:
        """The answer; the process is gone if there was none."""
        try:
            self.connection.send(job)
            if self.connection.poll(seconds):
                answer: Job = self.connection.recv()
                if answer.pop("fatal", False):
                    self.end()
                return answer
            failed = f"no answer in {seconds:.0f} s"
        except (EOFError, OSError):
            failed = "the process died"
        self.end()
        return {"status": "error", "failed": failed}

    def end(self) -> None:
        """Whatever it does at the moment."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_all(
    jobs: Iterable[Job],
    deadline: float,
    record: Callable[[Job], None],
    target: Callable[[Any], None] = serve,
) -> None:
    """Run the jobs one after the other, each to its own end, until the deadline."""
    worker = None
    for job in jobs:
        left = deadline - time.monotonic()
        if left <= 0:
            record({**job, "status": "skipped", "failed": "out of time"})
            continue
        if worker is None or not worker.process.is_alive():
            worker = Worker(target)
        seconds = min(left, LIMIT.get(job["kernel"], 60.0))
        record({**job, **worker.ask(job, seconds)})
    if worker is not None and worker.process.is_alive():
        worker.end()


# The plan, and the command.


def case(kernel: str, n: int, rows: int, dtype: str, dim: int = -1, signs: bool = False) -> Job:
    """A job that checks and times one kernel; ``rows`` vectors of length n along ``dim``."""
    keys = ("kernel", "n", "rows", "dtype", "dim", "signs")
    return dict(zip(keys, (kernel, n, rows, dtype, dim, signs), strict=True))


def large(n: int, dtype: str) -> int:
    """Vectors of a tensor that shows bandwidth."""
    return -(-TENSOR_BYTES // (n * DTYPES[dtype].itemsize) // 64) * 64


def plan(quick: bool) -> list[Job]:
    """All jobs, the most important first."""
    sizes = MAIN if quick else SIZES
    model = {"model": "Llama 1B" if quick else "Llama 8B", "rotations": ["R1", "R2", "R4"]}
    jobs = [case("transform", n, large(n, "bf16"), "bf16") for n in sizes]
    jobs += [case("transform", n, 1, "bf16") for n in sizes]
    jobs += [{"kernel": "apply", **model, "repeat": 3}]
    if importlib.util.find_spec("llmcompressor"):
        jobs += [{"kernel": "llm-compressor", **model}]
    for dtype in ("fp32", "fp16"):
        jobs += [case("transform", n, large(n, dtype), dtype) for n in sizes]
    for dtype in ("bf16", "fp32"):
        jobs += [case("transform", n, large(n, dtype), dtype, dim=0) for n in sizes]
    for n in sizes:
        jobs += [case("in place", n, large(n, "bf16"), "bf16")]
        jobs += [case("transform", n, large(n, "bf16"), "bf16", signs=True)]
    grid = () if quick else ROWS
    jobs += [case("transform", n, rows, "bf16") for rows in grid for n in sizes]
    jobs += [case("transform", n, rows, d) for d in ("fp32", "fp16") for rows in grid for n in MAIN]
    jobs += [case("transform", n, 1, dtype) for dtype in ("fp32", "fp16") for n in sizes]
    jobs += [case("in place", n, large(n, "bf16"), "bf16", dim=0) for n in sizes]
    jobs += [case("transform", n, large(n, "bf16"), "bf16", 0, True) for n in MAIN]
    once = {json.dumps(job): job for job in jobs if nbytes(job) <= MAX_BYTES}
    return list(once.values())


def nbytes(job: Job) -> int:
    """Of its tensor; a model counts as none."""
    return job["rows"] * job["n"] * DTYPES[job["dtype"]].itemsize if "rows" in job else 0


def dry_plan() -> list[Job]:
    """Every path once, in Triton's interpreter."""
    jobs = [case("transform", n, 3, dtype) for n in (64, 96) for dtype in ("bf16", "fp32")]
    jobs += [case("transform", 64, 3, "fp16", 0), case("transform", 64, 3, "bf16", signs=True)]
    jobs += [case("in place", 12, 3, "fp32", 0)]
    return [*jobs, {"kernel": "apply", "model": "tiny", "rotations": ["R1", "R2"], "repeat": 1}]


def compile_ahead(jobs: Iterable[Job], deadline: float, processes: int) -> None:
    """Fill Triton's cache on disk, in parallel: compiling would take longer than measuring.

    Few rows are enough: sizes enter the machine code by what divides them, and whether they are 1.
    """
    small = {
        json.dumps({**job, "rows": min(job["rows"], 4096), "warm": True}): None
        for job in jobs
        if "rows" in job
    }
    unique = [json.loads(job) for job in small]
    shares = [unique[start::processes] for start in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        for share in shares:
            pool.submit(run_all, share, deadline, lambda _: None)


def summary(result: Job) -> str:
    """A line for the screen."""
    words = [str(result["kernel"])]
    if "rows" in result:
        words += [f"{result['rows']} x {result['n']}", result["dtype"]]
        words += ["first dimension"] * (result["dim"] == 0) + ["signs"] * result["signs"]
    words += [result["status"]]
    if "median_ms" in result:
        words += [f"{1e3 * result['median_ms']:.1f} us,", f"{result['gb_per_s']:.0f} GB/s,"]
        words += [f"{result['percent_of_clone']:.0f} % of clone,", f"error {result['error']:.2f}"]
    words += [f"{u} {result[u]['seconds']:.3f} s" for u in result if u.startswith("undo=")]
    return " ".join([*words, result.get("failed", "")])


def main() -> None:
    """Run everything; write the file after every case, so that none is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, a smaller model")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes on a CPU, no figures")
    parser.add_argument("--compilers", type=int, default=min(12, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before the workers import Triton
    elif not torch.cuda.is_available():
        sys.exit("no GPU: run this where torch.cuda.is_available(), or with --interpret")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    # A job that is under way at the deadline is ended; the rest is for starting up and ending.
    deadline = start + 60 * arguments.minutes - min(15.0, 6 * arguments.minutes)
    jobs = dry_plan() if arguments.interpret else plan(arguments.quick)
    report: Job = {
        "kind": "measurement",
        "dry_run": arguments.interpret,
        "quick": arguments.quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": arguments.minutes,
        "tensor_bytes": TENSOR_BYTES,
        "machine": None,
        "results": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def record(result: Job) -> None:
        if result["kernel"] == "machine":
            report["machine"] = result
        else:
            report["results"].append(result)
        report["seconds"] = round(time.monotonic() - start, 1)
        # JSON knows no NaN, which a wrong kernel may well have.
        text = json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None), indent=1)
        arguments.out.write_text(text + "\n")
        print(summary(result), flush=True)

    if not arguments.interpret:
        share = start + 20 * arguments.minutes  # at most a third
        compile_ahead(jobs, share, arguments.compilers)
    run_all([{"kernel": "machine"}, *jobs], deadline, record)
    print(f"{len(report['results'])} cases in {report['seconds']} s: {arguments.out}")


if __name__ == "__main__":
    main()
