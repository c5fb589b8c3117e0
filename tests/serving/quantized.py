"""Checkpoints as a quantizer of the compressed-tensors family writes them, by round-to-nearest."""

import json

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from engine import PROMPTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS = {"type": "int", "symmetric": True, "dynamic": False}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
GROUP = 32


@torch.no_grad()
def token_scores(model, tokens):
    """Log-probabilities of all tokens but the first, as a model of transformers computes them."""
    logprobs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(-1, torch.tensor(tokens)[1:, None])[:, 0]


def quantize(folder, bits):
    """Quantize all linear layers but the head, in place: to W8A8 or to W4A16.

    Returns what transformers makes of the longest prompt with the same values of the weights.
    """
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("_proj.weight")]
    coded = {name.removesuffix("weight"): _codes(tensors.pop(name), bits) for name in names}
    values = {f"{stem}weight": _values(*codes) for stem, codes in coded.items()}
    save_file(tensors | values, folder / "model.safetensors", metadata={"format": "pt"})
    expected = token_scores(AutoModelForCausalLM.from_pretrained(folder), PROMPTS[-1])
    for stem, codes in coded.items():
        tensors |= {f"{stem}{leaf}": value for leaf, value in _stored(*codes, bits).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _description(bits)
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def _codes(weight, bits):
    groups = weight.unflatten(-1, (-1, GROUP if bits == 4 else weight.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (groups / scale).round().flatten(-2), scale.squeeze(-1)


def _values(codes, scale):
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def _stored(codes, scale, bits):
    codes, shape = codes.to(torch.int8), torch.tensor(codes.shape)
    if bits == 8:
        return {"weight": codes, "weight_scale": scale}
    return {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": shape,
    }


def _description(bits):
    weights = WEIGHTS | {"num_bits": bits, "strategy": "channel"}
    if bits == 4:
        weights |= {"strategy": "group", "group_size": GROUP}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": TOKENS if bits == 8 else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
