"""A model with outlier channels that computes the same function.

Large models grow channels whose activations are tens of times larger than all others; a small one
does not. They can be made: multiply a channel where it is written by ``s``, and divide by ``s``
where it is read. If ``s`` is a power of two, not one bit of the logits changes.

=======================  ==================================================
multiplied               divided
=======================  ==================================================
norm scale               columns of the linears that read the norm
up projection, rows      down projection, columns
value projection, rows   output projection, columns of all heads of a group
key projection, rows     query projection, rows of all heads of a group
=======================  ==================================================

Between queries and keys lies RoPE, which mixes channel ``i`` with ``i + head_dim / 2``: the two
get the same scale.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


@torch.no_grad()
def with_outliers(
    model: LlamaForCausalLM, *, channels: int = 3, scale: int = 16, seed: int = 0
) -> LlamaForCausalLM:
    """Return a copy of a model with outlier channels.

    Args:
        model: a Llama, which stays as it is.
        channels: how many, in every norm and every up projection; besides these one in every
            value head and one RoPE pair in every key head.
        scale: their scale, a power of two.
        seed: decides which channels.

    Raises:
        ValueError: ``scale`` is no power of two, and would not be exact.
    """
    if scale < 1 or scale & (scale - 1):
        raise ValueError(f"scale={scale} is not a power of two, so rounding would change the model")
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int, count: int = channels) -> Tensor:
        return torch.randperm(size, generator=generator)[:count]

    for layer in result.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            index = draw(norm.weight.numel())
            norm.weight[index] *= scale
            for linear in linears:
                linear.weight[:, index] /= scale
        index = draw(mlp.up_proj.out_features)
        _scale_outputs(mlp.up_proj, index, scale)
        mlp.down_proj.weight[:, index] /= scale
        size, group = attention.head_dim, attention.num_key_value_groups
        for head in range(attention.k_proj.out_features // size):
            queries = [size * (head * group + member) for member in range(group)]
            index = draw(size, 1)
            _scale_outputs(attention.v_proj, size * head + index, scale)
            for start in queries:
                attention.o_proj.weight[:, start + index] /= scale
            index = draw(size // 2, 1)
            pair = torch.cat((index, index + size // 2))
            _scale_outputs(attention.k_proj, size * head + pair, scale)
            for start in queries:
                _scale_outputs(attention.q_proj, start + pair, 1 / scale)
    return result


def _scale_outputs(linear: nn.Linear, index: Tensor, factor: float) -> None:
    linear.weight[index] *= factor
    if linear.bias is not None:
        linear.bias[index] *= factor
