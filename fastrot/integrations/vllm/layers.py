"""R4 and R3 on the layers of vLLM, by what every caller of a layer goes through.

A wrapper around a quantization method would change its class, by which vLLM chooses how weights are
loaded; a forward hook would be passed by where LoRA calls the method, or transformers' models
attention. So it is functions of these instances that are replaced.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.integrations.vllm.recorded import on_rank
from fastrot.integrations.vllm.served import ServedRotation


def rotate_input(method: Any, site: OnlineSite) -> None:
    """Let the quantization method of one linear layer rotate what it multiplies.

    Args:
        method: of this layer alone.
        site: the rotation of the layer's input.
    """
    create, apply = method.create_weights, method.apply

    def create_weights(
        layer: Any, input_size_per_partition: int, *args: Any, **kwargs: Any
    ) -> None:
        layer.fastrot_input = online_on_rank(site, input_size_per_partition)
        create(layer, input_size_per_partition, *args, **kwargs)

    def rotate_and_apply(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rotate = layer._modules["fastrot_input"].forward
        result: Tensor = apply(layer, rotate(x), *args, **kwargs)
        return result

    method.create_weights, method.apply = create_weights, rotate_and_apply


def rotate_attention(layer: Any, sites: Mapping[str, OnlineSite]) -> None:
    """Let an attention layer rotate queries and keys, before they are quantized and cached.

    Args:
        layer: vLLM's, which gets them after RoPE.
        sites: the rotations by location, ``q_attn`` and ``k_cache``.
    """
    for site in sites.values():
        if site.rotation.size != layer.head_size:
            raise RotationError(
                f"{site.group} of {site.module} rotates heads of {site.rotation.size}, vLLM's have "
                f"{layer.head_size}; serve the model rotated without {site.group}"
            )
    # Queries and keys of one matrix share a module, which rotates both at once.
    made = {replace(site, location="q_attn"): online(site) for site in sites.values()}
    for location, site in sites.items():
        setattr(layer, f"fastrot_{location}", made[replace(site, location="q_attn")])
    forward, modules = layer.forward, layer._modules

    def rotated(query: Tensor, key: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        of_query, of_key = modules.get("fastrot_q_attn"), modules.get("fastrot_k_cache")
        if of_query is of_key and key is not None:
            query, key = of_query.heads(query.flatten(1), key.flatten(1))
        else:
            size = layer.head_size
            if of_query is not None:
                query = of_query(query.flatten(1).unflatten(1, (-1, size)))
            if of_key is not None and key is not None:
                key = of_key(key.flatten(1).unflatten(1, (-1, size)))
        result: Tensor = forward(query, key, *args, **kwargs)
        return result

    layer.forward = rotated


def online_on_rank(site: OnlineSite, width: int) -> ServedRotation:
    """The rotation as a rank has it whose part of every vector has ``width`` entries.

    Raises:
        RotationError: that is no whole number of blocks; names block sizes that work.
    """
    return online(on_rank(site, width))


def online(site: OnlineSite) -> ServedRotation:
    """The rotation of a site, where vLLM builds its model."""
    from vllm.platforms import current_platform

    device = torch.get_default_device()
    if device.type == "meta":
        device = torch.device(current_platform.device_type)
    return ServedRotation(site, device)
