"""Tiny checkpoints."""

import pytest
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

# Both kinds of attention, and more tokens than a window has.
GEMMA = SHAPES | {"query_pre_attn_scalar": 32, "sliding_window": 16}
POST_NORMS = {
    # vLLM's has no head of its own.
    "gemma2": GEMMA | {"tie_word_embeddings": True},
    "gemma3_text": GEMMA,
    "olmo2": SHAPES,
}


def first(*names):
    """Parameters of which all but the first are exhaustive: each start of vLLM takes seconds."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in names[1:])]


def model(family, **kwargs):
    if family in EXPERTS | POST_NORMS:
        made = build(FAMILIES[family], torch.float32, **(EXPERTS | POST_NORMS)[family])
        if made.config.tie_word_embeddings:
            # Else every token is followed by itself, whatever the layers do.
            made.get_input_embeddings().weight.data *= 0.1
        return made
    return tiny(family, vocab=256, **SIZES, **kwargs)


def checkpoint(folder, family, recipe=None, **kwargs):
    """A checkpoint of a tiny model, rotated by a recipe if there is one."""
    made = model(family, **kwargs)
    if recipe is not None:
        fastrot.apply(made, fastrot.Recipe(**recipe))
    made.save_pretrained(folder)
    return folder
