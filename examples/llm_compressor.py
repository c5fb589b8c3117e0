"""Rotate a model, quantize it with llm-compressor, save it for vLLM and transformers.

    pip install fastrot llmcompressor
    python examples/llm_compressor.py MODEL_DIR OUT_DIR --scheme W8A8
    vllm serve OUT_DIR    # with fastrot beside vLLM, which finds it by itself

Rotate in memory: of a folder with R4 llm-compressor believes that it is quantized already.
"""

import argparse
import json
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastrot


def main() -> None:
    """Write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="MODEL_DIR")
    parser.add_argument("target", type=Path, metavar="OUT_DIR")
    parser.add_argument("--scheme", choices=("W8A8", "W4A16"), default="W8A8")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    fastrot.apply(model, rotations=("R1", "R2", "R3", "R4"))
    modifier = QuantizationModifier(targets=["Linear"], scheme=args.scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=modifier, processor=tokenizer)
    model.save_pretrained(args.target)
    # It writes config.json from that of the original model, without the record of the rotations.
    file = args.target / "config.json"
    settings = json.loads(file.read_text()) | {"fastrot": model.config.fastrot}
    file.write_text(json.dumps(settings, indent=2))
    tokenizer.save_pretrained(args.target)


if __name__ == "__main__":
    main()
