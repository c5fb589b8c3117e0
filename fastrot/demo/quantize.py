"""Simulated W4A4KV4: everything a decoder layer reads is rounded to 4 bits, and stays a float.

The simplest quantizer there is, round to nearest: no calibration, no clipping, no groups.

===========  ========================================  ==========================
what         one scale for each                        levels
===========  ========================================  ==========================
weights      output channel                            15, symmetric about zero
activations  token, at the input of a decoder linear   15, symmetric about zero
keys/values  token and head, as they enter the cache   16, from least to greatest
===========  ========================================  ==========================

The embedding, the norms and the head keep their precision. Online rotations come before the
rounding: R4 because hooks run in the order in which they were registered, R3 because it stands
before the cache.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from fastrot.lab.quantizers import round_asymmetric, round_symmetric


class RoundingLayer(DynamicLayer):
    """One layer of a cache whose keys and values are rounded when they come in."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values, ``(batch, kv_heads, length, head_dim)``; return all, rounded."""
        keys = round_asymmetric(key_states, self.bits)
        values = round_asymmetric(value_states, self.bits)
        result: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)
        return result


def rounding_cache(model: Any, bits: int = 4) -> Cache:
    """An empty cache for one batch of sequences; the model takes it as it takes any cache."""
    return Cache(layers=[RoundingLayer(bits) for _ in range(model.config.num_hidden_layers)])


@torch.no_grad()
def quantize(model: Any, bits: int = 4) -> None:
    """Round the weights of all decoder linears, and from now on their inputs, in place.

    Rotate first: a rotation that is applied later would act on rounded numbers, and R4 after the
    rounding of what it rotates.

    Args:
        model: a causal language model of transformers.
        bits: of weights and activations; the cache has its own, see :func:`rounding_cache`.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(round_symmetric(module.weight, bits))
            module.register_forward_pre_hook(partial(_round_input, bits=bits))


def _round_input(module: nn.Module, args: tuple[Tensor, ...], bits: int) -> tuple[Tensor, ...]:
    return (round_symmetric(args[0], bits), *args[1:])
