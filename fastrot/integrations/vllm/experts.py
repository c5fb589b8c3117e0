"""R4 inside the experts of vLLM on the CPU: between their two products.

vLLM's own experts are one call there, with nothing between the products. These are of its kind, so
that routing, shared experts and parallel ranks stay vLLM's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.integrations.vllm.layers import online_on_rank

ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
"""Those that vLLM has by themselves on the CPU, gates before ups."""


@torch.library.custom_op("fastrot::experts_product", mutates_args=())
def experts_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """What each expert makes of its rows. torch.compile traces torch's own in bfloat16 alone.

    Args:
        x: rows sorted by expert, ``(rows, in)``.
        weight: ``(experts, out, in)``.
        ends: where the rows of each expert end, int32.
    """
    return grouped_mm(x, weight.transpose(1, 2), offs=ends)


@experts_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


class RotatedExperts(CPUUnquantizedExperts):
    """Unquantized experts with R4 on the input of their down projections."""

    layer: Any

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave the weights as they were loaded; only vLLM's one call wants them packed."""
        self.layer = layer

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        *_: Any,
        apply_router_weight_on_input: bool,
        **__: Any,
    ) -> None:
        """Write the weighted sums of what the chosen experts make of every token.

        Args:
            output: ``(tokens, hidden)``, which is written.
            hidden_states: ``(tokens, hidden)``.
            w1: gates, then ups, ``(experts, 2 * intermediate, hidden)``.
            w2: ``(experts, hidden, intermediate)``.
            topk_weights: of the chosen experts, ``(tokens, k)``.
            topk_ids: which those are.
            activation: between gates and ups.
            apply_router_weight_on_input: the weights are in ``hidden_states`` already.
        """
        experts, order = topk_ids.flatten().sort(stable=True)
        ends = torch.searchsorted(
            experts, torch.arange(len(w1), dtype=experts.dtype), right=True, out_int32=True
        )
        tokens = order // topk_ids.shape[1]

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = experts_product(x, weight, ends)
            return y if bias is None else y + bias[experts]

        up = product(hidden_states[tokens], w1, self.w1_bias)
        inner = up.new_empty(up.shape[0], w2.shape[2])
        self.activation(activation, inner, up)
        down = product(self.layer.fastrot_down_input(inner), w2, self.w2_bias).float()
        if not apply_router_weight_on_input:
            down = down * topk_weights.flatten()[order, None]
        output.copy_(down.new_zeros(output.shape).index_add(0, tokens, down))


def rotate_experts(layer: Any, method: Any, site: OnlineSite) -> None:
    """Let the quantization method of stacked experts rotate what goes into down projections.

    Args:
        layer: vLLM's, which has no weights yet.
        method: of this layer alone.
        site: the rotation.

    Raises:
        RotationError: nothing can act inside these experts; says why, and the way out.
    """
    problem = _problem(layer, method)
    if problem is not None:
        raise RotationError(
            f"{site.group} can't act inside the experts of {site.module}: {problem}; serve the "
            f"model rotated without {site.group}, or in transformers"
        )
    create = method.create_weights

    def create_weights(layer: Any, *, intermediate_size_per_partition: int, **kwargs: Any) -> None:
        layer.fastrot_down_input = online_on_rank(site, intermediate_size_per_partition)
        create(layer, intermediate_size_per_partition=intermediate_size_per_partition, **kwargs)

    method.create_weights, method.experts_cls = create_weights, RotatedExperts
    # Such weights are packed, and the experts are not told of their layer.
    method.supports_pre_processed_weights = False


def _problem(layer: Any, method: Any) -> str | None:
    if not isinstance(method, UnquantizedFusedMoEMethod):
        return f"they are quantized ({type(method).__name__}), which is one call in vLLM"
    if method.unquantized_backend != UnquantizedMoeBackend.CPU:
        backend = method.unquantized_backend.value
        return f"vLLM computes them by {backend}, and fastrot knows its CPUs' without LoRA"
    if layer.activation not in ACTIVATIONS:
        return f"their activation {layer.activation.value!r} is part of one call in vLLM"
    if layer.use_ep:
        return "expert parallelism is on (leave enable_expert_parallel out)"
    return None
