"""Tiny checkpoints."""

import torch
from helpers import tiny
from zoo import FAMILIES, build

import fastrot

# vLLM's attention on CPUs wants heads of a multiple of 32.
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 128, "intermediate": 224}

SHAPES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "intermediate_size": 224,
}
EXPERTS = {
    # Four experts of which two are taken: the weights add up to one, or do not.
    "mixtral": SHAPES | {"sliding_window": None},
    "qwen3_moe": SHAPES | {"moe_intermediate_size": 96, "norm_topk_prob": False},
}


def model(family, **kwargs):
    if family in EXPERTS:
        return build(FAMILIES[family], torch.float32, **EXPERTS[family])
    return tiny(family, vocab=256, **SIZES, **kwargs)


def checkpoint(folder, family, recipe=None, **kwargs):
    """A checkpoint of a tiny model, rotated by a recipe if there is one."""
    made = model(family, **kwargs)
    if recipe is not None:
        fastrot.apply(made, fastrot.Recipe(**recipe))
    made.save_pretrained(folder)
    return folder
