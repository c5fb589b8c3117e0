"""What learned rotations gain over Hadamard matrices: SmolLM2-135M, two domains, several seeds.

    make smollm2 && .venv/bin/python benchmarks/learned.py --json benchmarks/results/FILE

Learned from seven tenths of Python's language reference, judged by the gate on Python code, and
evaluated on the rest of the reference (in domain) and on licences (another domain, which nothing
before has seen; those of Debian, or `--other FILE...`). Reported is the share of the loss that
quantization adds with Hadamard R1-R4 and that learned R1-R3 take away, with the standard error of
the paired differences. The file grows with every run; a cell that it has is not made again. With
`--peers` those get the seconds that `fastrot.learn` took in the same cell.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from apply import machine
from learned_peers import PEERS
from smollm2 import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastrot
from fastrot.demo.corpus import heldout_files
from fastrot.lab.corpus import cut, found_text, read_texts, tokenize
from fastrot.lab.evaluate import Losses, compare, evaluate
from fastrot.lab.quantized import quantized
from fastrot.lab.schemes import Scheme

ROTATIONS = ("R1", "R2", "R3", "R4")
SCHEMES = ("a4kv4", "w4gptq-a4-kv4", "w4a4kv4", "w4mse-a4-kv4", "mxfp4", "nvfp4")
DOMAINS = ("in domain", "other domain")
CONTEXT = 512
LICENCES = Path("/usr/share/common-licenses")


def texts(tokenizer: Any, other: list[Path], tokens: int) -> dict[str, Tensor]:
    """Windows to learn from and to judge by, and those of both domains."""
    reference = found_text()
    split = len(reference) * 7 // 10
    files = other or sorted(p for p in LICENCES.iterdir() if p.is_file() and not p.is_symlink())
    sources = {
        "learn": (reference[:split], 24 * CONTEXT),
        "judge": (read_texts(heldout_files()), 16 * CONTEXT),
        "in domain": (reference[split:], tokens),
        "other domain": (read_texts(files), tokens),
    }
    return {name: cut(tokenize(text, tokenizer), CONTEXT, n) for name, (text, n) in sources.items()}


def losses_of(
    base: Any, recipe: fastrot.Recipe | None, scheme: str | None, windows: dict[str, Tensor]
) -> dict[str, Losses]:
    """Of both domains, with a recipe and a scheme."""
    model = copy.deepcopy(base)
    if recipe is not None:
        fastrot.apply(model, recipe)
    with quantized(model, scheme or Scheme(), windows["learn"]):
        return {name: evaluate(model, windows[name]) for name in DOMAINS}


def taken_away(exact: Losses, before: Losses, after: Losses) -> dict[str, float]:
    """The share of what quantization adds that is closed, and its paired standard error."""
    gain, left = compare(after, before), before.mean - exact.mean
    return {"closed": -gain.mean / left, "error": gain.error / left}


def prepared(args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """SmolLM2 in float32, and its :func:`texts`."""
    with tempfile.TemporaryDirectory() as place:
        folder = write(args.model or Path(place) / "smollm2")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return base, texts(AutoTokenizer.from_pretrained(folder), args.other, args.tokens)


def parser_of(description: str) -> argparse.ArgumentParser:
    """The arguments that :func:`prepared` and :func:`started` need."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, help="where SmolLM2 is kept; default: nowhere")
    parser.add_argument("--other", type=Path, nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=60 * CONTEXT)
    return parser


def started(path: Path | None, what: str) -> dict[str, Any]:
    """What a file has already, or the beginning of one."""
    if path and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"kind": "measurement", "what": what, "machine": machine(), "cells": {}}


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fill in the cells that are not there yet."""
    base, windows = prepared(args)
    found["tokens"] = {name: w[:, 1:].numel() for name, w in windows.items()}
    cells = found["cells"]
    wanted = [
        (scheme, seed, method)
        for seed in range(args.seeds)
        for scheme in args.schemes
        for method in ("", *args.peers)  # the peers get the seconds of the first
        if f"{scheme} {seed}{method and ' '}{method}" not in cells
    ]
    exact = losses_of(base, None, None, windows) if wanted else {}
    hadamard: dict[str, dict[str, Losses]] = {}
    for scheme, seed, method in wanted:
        if scheme not in hadamard:
            hadamard[scheme] = losses_of(base, fastrot.Recipe(ROTATIONS), scheme, windows)
        began = time.perf_counter()
        cell: dict[str, Any] = {}
        if method:
            recipe = fastrot.Recipe(ROTATIONS, seed=seed)
            seconds = cells[f"{scheme} {seed}"]["seconds"]
            found_by = PEERS[method](base, recipe, scheme, windows["learn"], seconds)
            recipe = fastrot.Recipe(ROTATIONS, seed=seed, matrices=found_by)
        else:
            recipe = learned = fastrot.learn(
                base,
                windows["learn"],
                ROTATIONS,
                scheme=scheme,
                heldout=windows["judge"],
                steps=args.steps,
                seed=seed,
            )
            cell["gate"] = [learned.gain.mean, learned.gain.error]
            cell["accepted"], cell["defect"] = learned.accepted, learned.defect
        cell["seconds"] = time.perf_counter() - began
        after = losses_of(base, recipe, scheme, windows)
        for name in DOMAINS:
            cell[name] = {
                "float": exact[name].mean,
                "hadamard": hadamard[scheme][name].mean,
                "learned": after[name].mean,
                **taken_away(exact[name], hadamard[scheme][name], after[name]),
            }
            shown = f"{scheme:<14} seed {seed}  {method or 'fastrot':<9}  {name:<12}"
            print(f"{shown} {cell[name]['closed']:6.1%}", flush=True)
        cells[f"{scheme} {seed}{method and ' '}{method}"] = cell
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Print shares; write all figures."""
    parser = parser_of(__doc__)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    measure(args, started(args.json, "learned"))


if __name__ == "__main__":
    main()
