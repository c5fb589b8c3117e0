"""Trains the demo model, a byte-level Llama, on the source of Python's standard library.

    python -m fastrot.demo.train --out DIR

The default run takes under an hour on one processor core. `DIR` always holds the newest
checkpoint in bfloat16 and `training_log.csv`. A run is fixed by its options, by the versions
in the log's first line and by the processor's arithmetic.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fastrot.demo.corpus import SEPARATOR, heldout_files, read_bytes, training_files


@dataclass(frozen=True)
class Settings:
    """What determines a run; lengths count tokens, and a token is a byte."""

    seed: int = 0
    steps: int = 8000
    batch_tokens: int = 2048
    context: int = 512
    short_context: int = 256
    short_share: float = 0.8
    warmup_steps: int = 300
    peak_rate: float = 2e-3
    weight_decay: float = 0.1
    largest_gradient_norm: float = 1.0
    steps_per_evaluation: int = 200

    def context_at(self, step: int) -> int:
        """Return the sequence length of a step: short for the first share of the run."""
        return self.short_context if step < self.short_share * self.steps else self.context

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine to 1 % of the peak."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.peak_rate * (0.505 + 0.495 * cos(pi * progress))


def build_model(settings: Settings) -> transformers.LlamaForCausalLM:
    """Return the untrained model: 1.8 million weights, one token per byte value."""
    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
    )
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU faster than SDPA once compiled
    return model


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW that decays the matrices and leaves the norm weights alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def cut(stream: Tensor, context: int, start: int = 0) -> Tensor:
    """Cut a stream into rows of `context` tokens plus the one token that follows them."""
    return stream[start:].unfold(0, context + 1, context)


def batches(stream: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Yield one batch of rows per step; every pass cuts anew and shuffles the rows."""
    order = torch.Generator().manual_seed(settings.seed)
    step = 0
    while step < settings.steps:
        context = settings.context_at(step)
        rows = cut(stream, context, int(torch.randint(context, (), generator=order)))
        shuffled = torch.randperm(len(rows), generator=order)
        size = settings.batch_tokens // context
        for first in range(0, len(rows) - size + 1, size):
            if step == settings.steps or settings.context_at(step) != context:
                break
            yield rows[shuffled[first : first + size]].long()
            step += 1


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """Return the mean loss of next-token prediction over a batch, in nats per byte."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def take_step(
    forward: Any, optimizer: torch.optim.Optimizer, rows: Tensor, rate: float, settings: Settings
) -> float:
    """Update the weights from one batch and return its loss before the update."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(forward, rows)
    torch.autograd.backward(loss)
    for group in optimizer.param_groups:
        group["lr"] = rate
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(weights, settings.largest_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def heldout_loss(model: Any, stream: Tensor, context: int, tokens: int | None = None) -> float:
    """Return the loss over a stream, or over rows spread evenly in it, in nats per byte."""
    rows = cut(stream, context)
    if tokens is not None:
        rows = rows[:: max(1, len(rows) * context // tokens)]
    parts = (rows[first : first + 8].long() for first in range(0, len(rows), 8))
    return sum(float(loss_of(model, part)) * len(part) for part in parts) / len(rows)


def save(model: transformers.LlamaForCausalLM, out: Path) -> transformers.LlamaForCausalLM:
    """Write a bfloat16 copy of the model and return the copy."""
    rounded = copy.deepcopy(model).bfloat16()
    rounded.save_pretrained(out)
    return rounded


def provenance(settings: Settings, **corpus: int) -> str:
    """Describe a run in one line of JSON: versions, corpus sizes and settings."""
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: str(module.__version__) for module in (torch, transformers)}
    return json.dumps(versions | corpus | asdict(settings))


def train(out: Path, settings: Settings, compiled: bool = True) -> float:
    """Train the model, write it to `out`, and return its held-out loss in nats per byte."""
    out.mkdir(parents=True, exist_ok=True)
    files, heldout = training_files(), torch.tensor(read_bytes(heldout_files()))
    stream = torch.tensor(read_bytes(files))
    sizes = {"files": len(files), "bytes": len(stream), "heldout_bytes": len(heldout)}
    model = build_model(settings)
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    optimizer = build_optimizer(model, settings)
    began, total = time.monotonic(), 0.0
    with open(out / "training_log.csv", "w", buffering=1) as log:
        print("#", provenance(settings, **sizes), file=log)
        print("step,tokens,context,rate,train_loss,heldout_loss,seconds", file=log)
        progress = tqdm(batches(stream, settings), total=settings.steps, unit="step")
        for step, rows in enumerate(progress):
            rate, context = settings.rate_at(step), settings.context_at(step)
            total += take_step(forward, optimizer, rows, rate, settings)
            if (step + 1) % settings.steps_per_evaluation and step + 1 < settings.steps:
                continue
            loss = heldout_loss(save(model, out), heldout, context, tokens=32768)
            tokens, seconds = (step + 1) * settings.batch_tokens, time.monotonic() - began
            mean, total = total / (step % settings.steps_per_evaluation + 1), 0.0
            line = f"{step + 1},{tokens},{context},{rate:.3g},{mean:.4f},{loss:.4f},{seconds:.0f}"
            print(line, file=log)
            progress.set_postfix(heldout=f"{loss:.4f}")
        loss = heldout_loss(save(model, out), heldout, settings.context)
        print("#", json.dumps({"heldout_loss_of_every_byte": round(loss, 4)}), file=log)
    return loss


def main() -> None:
    """Run the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and log")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--peak-rate", type=float, default=defaults.peak_rate)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = Settings(seed=args.seed, steps=args.steps, peak_rate=args.peak_rate)
    train(args.out, settings, compiled=not args.no_compile)


if __name__ == "__main__":
    main()
