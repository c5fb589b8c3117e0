"""What rotations cost while SmolLM2-135M decodes: time of a token beside the unrotated model's.

    make smollm2 && .venv/bin/python benchmarks/decode.py --json benchmarks/results/FILE

Every case takes a prompt of random tokens and then single tokens, greedily, from a cache of its
own; the cases take turns, token by token, so that all see the same machine. Reported are medians
over the tokens, and how many of the tokens are those of the unrotated model, which are fed to all.
With `--compile` the models are compiled for single tokens, with a static cache.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from apply import machine
from smollm2 import write
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import fastrot
from fastrot.integrations.transformers import cache_argument
from fastrot.online import installed

CASES: dict[str, dict[str, Any]] = {
    "unrotated": {},
    "R1 R2": {"rotations": ("R1", "R2")},
    "R1 R2, keep_head": {"rotations": ("R1", "R2"), "keep_head": True},
    "R1-R4": {"rotations": ("R1", "R2", "R3", "R4")},
}
PROMPT = 64


class Decoder:
    """A model and its cache."""

    def __init__(self, model: Any, batch: int, tokens: int, compiled: bool):
        self.model = model
        self.cache: Any = DynamicCache(config=model.config)
        if compiled:
            self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + tokens + 8)
        self.run = torch.compile(model, dynamic=False) if compiled else model
        self.seconds: list[float] = []
        self.same = 0

    def step(self, ids: Tensor, timed: bool = True) -> Tensor:
        """The next token of every row."""
        start = time.perf_counter()
        run = self.run if ids.shape[1] == 1 else self.model
        logits = run(ids, **cache_argument(self.model, self.cache), use_cache=True).logits
        if timed:
            self.seconds.append(time.perf_counter() - start)
        return logits[:, -1:].argmax(-1)


@torch.no_grad()
def measure(folder: Path, batch: int, tokens: int, dtype: torch.dtype, compiled: bool) -> Any:
    """Milliseconds of a token for each case, and the ratio to the unrotated model."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    decoders = {}
    for name, options in CASES.items():
        model = copy.deepcopy(base)
        if options:
            fastrot.apply(model, fastrot.Recipe(**options))
        decoders[name] = Decoder(model, batch, tokens, compiled)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(base.config.vocab_size, (batch, PROMPT), generator=generator)
    ids = {name: decoder.step(prompt, False) for name, decoder in decoders.items()}
    token = ids["unrotated"]
    for number in range(tokens + 4):
        answers = {name: d.step(token, number >= 4) for name, d in decoders.items()}
        for name, answer in answers.items():
            decoders[name].same += int((answer == answers["unrotated"]).sum())
        token = answers["unrotated"]
    plain = statistics.median(decoders["unrotated"].seconds)
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(d.seconds),
            "least": 1e3 * min(d.seconds),
            "ratio": statistics.median(d.seconds) / plain,
            "same tokens": d.same / (batch * (tokens + 4)),
            "transforms": sum(1 for _ in installed(d.model)),
        }
        for name, d in decoders.items()
    }


def main() -> None:
    """Print the ratios; write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / "smollm2")
        for batch in args.batches:
            dtype = getattr(torch, args.dtype)
            found[str(batch)] = measure(folder, batch, args.tokens, dtype, args.compile)
            for name, row in found[str(batch)].items():
                print(
                    f"batch {batch:>2}  {name:<18} {row['milliseconds']:7.2f} ms  "
                    f"{row['ratio']:.3f}  {row['same tokens']:.0%} same tokens"
                )
    if args.json:
        report = {
            "kind": "measurement",
            "what": "decode",
            "dtype": args.dtype,
            "compiled": args.compile,
            "machine": machine(),
            "batches": found,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
