"""Tiny checkpoints."""

from helpers import tiny

import fastrot

# vLLM's attention on CPUs wants heads of a multiple of 32.
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 128, "intermediate": 224}


def model(family, **kwargs):
    return tiny(family, vocab=256, **SIZES, **kwargs)


def checkpoint(folder, family, recipe=None, **kwargs):
    """A checkpoint of a tiny model, rotated by a recipe if there is one."""
    made = model(family, **kwargs)
    if recipe is not None:
        fastrot.apply(made, fastrot.Recipe(**recipe))
    made.save_pretrained(folder)
    return folder
