"""What rotating costs in bfloat16: logits and perplexity beside the model's own rounding.

    make smollm2 && .venv/bin/python benchmarks/bf16.py --json benchmarks/results/FILE

The reference is the bfloat16 checkpoint computed in float32. The text is Python's own language
reference. Synthetic cases multiply one channel of the embedding, as real models' massive channels
are large; `predicted` is the figure that `fastrot.apply` warns by.
"""

import argparse
import copy
import json
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import torch
from apply import machine
from smollm2 import write
from torch import Tensor, nn

import fastrot
from fastrot.values import dynamic_range

CASES: dict[str, tuple[str, ...]] = {
    "unrotated": (),
    "R1 R2": ("R1", "R2"),
    "R1-R4": ("R1", "R2", "R3", "R4"),
}


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of every row of ids, in float32."""
    return torch.cat([model(row[None]).logits.float() for row in ids])


def measure(base: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Relative logit error and perplexity of each case, in bfloat16."""
    reference = logits_of(copy.deepcopy(base).float(), ids)
    found: dict[str, Any] = {"float32": {"perplexity": perplexity(reference, ids)}}
    for name, rotations in CASES.items():
        model = copy.deepcopy(base)
        if rotations:
            fastrot.apply(model, rotations)
        got = logits_of(model, ids)
        error = float((got - reference).norm() / reference.norm())
        same = float((got.argmax(-1) == reference.argmax(-1)).float().mean())
        found[name] = {
            "error": error,
            "ratio": error / found.get("unrotated", {"error": error})["error"],
            "same top token": same,
            "perplexity": perplexity(got, ids),
        }
    return found


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """Of the next token."""
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return float(loss.exp())


def main() -> None:
    """Measure SmolLM2 as it is and with one channel made massive; print, write."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint; default SmolLM2-135M")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 8.0, 64.0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.model or write(Path(tempfile.gettempdir(), "fastrot-smollm2"))
    text = "\n".join(pydoc_data.topics.topics.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text)["input_ids"][: arguments.rows * arguments.length])
    ids = ids.view(arguments.rows, arguments.length)
    results = {}
    for factor in arguments.factors:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        if factor != 1:
            amplify(base, channel=7, factor=factor)
        found = measure(base, ids)
        found["predicted"] = dynamic_range(base, fastrot.plan(base, "R1"))
        results[f"channel 7 x {factor:g}" if factor != 1 else "as it is"] = found
        print(json.dumps({factor: found}, indent=1), flush=True)
    if arguments.json:
        report = {"machine": machine(), "tokens": ids.numel(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def amplify(model: Any, channel: int, factor: float) -> None:
    """Make one channel of the embedding massive."""
    model.get_input_embeddings().weight.data[:, channel] *= factor


if __name__ == "__main__":
    main()
