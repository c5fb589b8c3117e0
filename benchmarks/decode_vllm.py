"""What rotations cost while vLLM decodes SmolLM2-135M on the CPU, beside the unrotated model.

    make smollm2 && .venv/bin/python benchmarks/smollm2.py FOLDER
    .venv/serving/bin/python benchmarks/decode_vllm.py FOLDER --json benchmarks/results/FILE

Every case is an engine in a process of its own. All stay there, and take turns: in each round each
decodes the same prompts of random tokens, and the median of its steps is what the round says of
it. Reported are medians over the rounds, and the least and the largest ratio to the unrotated
model within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from apply import machine

import fastrot

CASES: dict[str, tuple[str, ...]] = {
    "unrotated": (),
    "R1 R2": ("R1", "R2"),
    "R4": ("R4",),
    "R1-R4": ("R1", "R2", "R3", "R4"),
}
PROMPT = 32


def serve(folder: str, dtype: str, eager: bool) -> None:
    """Answer each line on stdin, a batch and a number of tokens, with the seconds of a step."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What vLLM prints.
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype=dtype, enforce_eager=eager, max_model_len=512, max_num_seqs=16,
        enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True,
    )  # fmt: skip
    print("ready", file=said, flush=True)
    generator = torch.Generator().manual_seed(0)
    for number, line in enumerate(sys.stdin):
        batch, tokens = (int(word) for word in line.split())
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        for row in range(batch):
            prompt = torch.randint(3, 40000, (PROMPT,), generator=generator).tolist()
            request = {"prompt_token_ids": prompt}
            llm.llm_engine.add_request(f"{number}-{row}", request, sampling)
        seconds = []
        while llm.llm_engine.has_unfinished_requests():
            start = time.perf_counter()
            llm.llm_engine.step()
            seconds.append(time.perf_counter() - start)
        # The first steps take the prompts, and the last ones empty the queue.
        print(statistics.median(seconds[4:-2]), file=said, flush=True)


class Engine:
    """A process that serves one case."""

    def __init__(self, folder: Path, dtype: str, eager: bool, cores: str):
        command = [sys.executable, __file__, str(folder), "--serve", dtype, *["--eager"] * eager]
        settings = {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env=os.environ | settings)
        if self._read() != "ready":
            raise RuntimeError(f"vLLM does not start with {folder}")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self, batch: int, tokens: int) -> float:
        """Seconds of a step."""
        assert self.process.stdin is not None
        print(batch, tokens, file=self.process.stdin, flush=True)
        return float(self._read())


def measure(
    folders: dict[str, Path], dtype: str, eager: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """For each batch and case: tokens a second, and the ratio of times to the unrotated model."""
    engines = {name: Engine(f, dtype, eager, args.cores) for name, f in folders.items()}
    found: dict[str, Any] = {}
    try:
        for batch in args.batches:
            rounds = [
                {name: engine.step(batch, args.tokens) for name, engine in engines.items()}
                for _ in range(args.rounds + 1)
            ][1:]
            ratios = {n: sorted(r[n] / r["unrotated"] for r in rounds) for n in engines}
            found[str(batch)] = {
                name: {
                    "tokens per second": batch / statistics.median(r[name] for r in rounds),
                    "ratio": statistics.median(ratios[name]),
                    "least": ratios[name][0],
                    "largest": ratios[name][-1],
                }
                for name in engines
            }
    finally:
        for engine in engines.values():
            engine.process.kill()
    return found


def main() -> None:
    """Print the ratios; write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what benchmarks/smollm2.py wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--cases", nargs="+", default=[*CASES][1:], choices=[*CASES][1:])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cores", default="1", help="of every engine, as 0-1 or 1")
    parser.add_argument("--serve", metavar="DTYPE", help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(str(args.folder), args.serve, args.eager)
        return
    report: dict[str, Any] = {"kind": "measurement", "what": "decode in vLLM"}
    report |= {"machine": machine(), "vllm": version("vllm-cpu"), "cores": args.cores}
    report["found"] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name.replace(" ", "") for name in args.cases}
        folders = {"unrotated": args.folder} | folders
        for name in args.cases:
            recipe = fastrot.Recipe(rotations=CASES[name])
            fastrot.rotate_checkpoint(args.folder, folders[name], recipe)
        for mode, dtype in ((m, d) for m in args.modes for d in args.dtypes):
            found = measure(folders, dtype, mode == "eager", args)
            report["found"][f"{mode}, {dtype}"] = found
            for batch, rows in found.items():
                for name, row in rows.items():
                    print(
                        f"{mode:>8} {dtype:>8}, batch {batch:>2}  {name:<10}"
                        f"{row['tokens per second']:8.1f} tokens/s  {row['ratio']:.3f} "
                        f"({row['least']:.3f} to {row['largest']:.3f})",
                        flush=True,
                    )
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
