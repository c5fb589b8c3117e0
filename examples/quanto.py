"""Rotate a model, quantize it with optimum-quanto, save its state, and load that again.

    pip install fastrot optimum-quanto
    python examples/quanto.py MODEL_DIR OUT_DIR

The state is one of quanto's, for a model of this configuration: built, given its online rotations
by `fastrot.restore`, and then the quantized weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from optimum.quanto import freeze, qint8, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fastrot


def load(folder: Path) -> Any:
    """The quantized model of a folder that :func:`main` wrote."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    fastrot.restore(model)
    weights = json.loads((folder / "quanto.json").read_text())
    requantize(model, load_file(folder / "quanto.safetensors"), weights)
    return model.eval()


def main() -> None:
    """Write OUT_DIR, and load it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="MODEL_DIR")
    parser.add_argument("target", type=Path, metavar="OUT_DIR")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval()
    fastrot.apply(model, rotations=("R1", "R2", "R3", "R4"))
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    args.target.mkdir(parents=True)
    model.config.save_pretrained(args.target)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.target / "quanto.safetensors")
    (args.target / "quanto.json").write_text(json.dumps(quantization_map(model)))
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        difference = (load(args.target)(ids).logits - model(ids).logits).abs().max()
    print(f"greatest difference of a logit after loading: {difference:.1e}")


if __name__ == "__main__":
    main()
