"""Rotate a model, quantize it with torchao, save its state, load that again, and generate.

    pip install fastrot torchao
    python examples/torchao_int8.py MODEL_DIR OUT_DIR

Weights have 8 bits and a scale for each row, activations 8 bits and a scale for each token. The
state is one for a model of this configuration: built, given its online rotations by
`fastrot.restore`, quantized alike, and then the weights.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoConfig, AutoModelForCausalLM

import fastrot


def quantize(model: Any) -> None:
    """Quantize all linear layers but the head."""

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not name.endswith("lm_head")

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), wanted)


def load(folder: Path) -> Any:
    """The quantized model of a folder that :func:`main` wrote."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    fastrot.restore(model)
    quantize(model)
    # Tensors of torchao's own classes, which are no parameters of a plain model.
    state = torch.load(folder / "torchao.pt", weights_only=False)
    model.load_state_dict(state, assign=True)
    return model


def main() -> None:
    """Write OUT_DIR, load it, and generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="MODEL_DIR")
    parser.add_argument("target", type=Path, metavar="OUT_DIR")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval()
    fastrot.apply(model, rotations=("R1", "R2", "R3", "R4"))
    quantize(model)
    args.target.mkdir(parents=True)
    model.config.save_pretrained(args.target)
    torch.save(model.state_dict(), args.target / "torchao.pt")
    ids, loaded = torch.arange(3, 19)[None], load(args.target)
    with torch.no_grad():
        difference = (loaded(ids).logits - model(ids).logits).abs().max()
    made = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, loaded)]
    print(f"the same tokens: {torch.equal(*made)}")
    print(f"greatest difference of a logit after loading: {difference:.1e}")


if __name__ == "__main__":
    main()
