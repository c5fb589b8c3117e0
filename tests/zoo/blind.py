"""Models that see around decoders whose stream no rotation can pass: tried with text alone."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from zoo import Family
from zoo.experts import GROUPED, INDEXER, LATENT, without
from zoo.unrotated import INKLING
from zoo.vision import (
    AUDIO,
    DEPTH,
    EXPERTS,
    IMAGE,
    INTERLEAVED,
    PIXTRAL,
    SPECIAL,
    SPECIAL_GLM,
    TOWER,
    VIDEO,
    WIDE,
)


class Alike:
    """torch.nn.functional for a model whose router is float32 whatever the rest is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``functional.linear``, in the dtype of the input."""
        return functional.linear(x, weight.to(x.dtype), bias)


try:
    from transformers.models.inkling2 import modeling_inkling2
except ImportError:
    pass  # an older transformers
else:
    modeling_inkling2.F = Alike()

try:
    from transformers.models.inkling2_loop import modeling_inkling2_loop
except ImportError:
    pass  # an older transformers
else:
    modeling_inkling2_loop.F = Alike()

    class Gate(modeling_inkling2_loop.Inkling2LoopMessageGate):
        """With projections in the dtype of their weights, which may be float64 here."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for projection in (self.forget_gate_proj, self.message_gate_proj):
                projection.register_forward_pre_hook(lambda m, x: x[0].to(m.weight.dtype))

    modeling_inkling2_loop.Inkling2LoopMessageGate = Gate

INKLING2: dict[str, Any] = {
    **without(without(INKLING, "n_shared_experts"), "mlp_layer_types"),
    "unpadded_vocab_size": 64,
    "n_layers_per_attn_res_block": 1,
}

INKLING2_LOOP: dict[str, Any] = {
    **INKLING2,
    "num_hidden_layers": 4,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "loop_gate_rank": 8,
}

INKLING_TOWER: dict[str, Any] = {
    **without(TOWER, "image_size"),
    "posemb_grid_size": 4,
    "projection_hidden_dim": 40,
    "text_hidden_size": 96,
}

PATCHES: dict[str, Any] = {
    **without(TOWER, "image_size"),
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "layer_types": ["window_attention", "full_attention"],
}

FAMILIES: dict[str, Family] = {
    "hy_v4_vl": Family(
        "hy_v4_vl",
        "HYV4VLForConditionalGeneration",
        {
            "text_config": {
                **LATENT,
                **GROUPED,
                "index_topk": 5,
                "index_head_dim": 12,
                "index_n_heads": 4,
                "mlp_layer_types": ["dense", "sparse"],
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {**without(TOWER, "image_size"), "out_hidden_size": 96},
        },
    ),
    "inkling_mm_model": Family(
        "inkling_mm_model",
        "InklingForConditionalGeneration",
        {
            "text_config": INKLING,
            "vision_config": {
                "text_hidden_size": 96,
                "patch_size": 4,
                "hidden_size": 32,
                "n_layers": 4,
                "num_attention_heads": 2,
            },
            "audio_config": {"text_hidden_size": 96, "n_mel_bins": 8, "mel_vocab_size": 16},
        },
    ),
    "inkling2": Family(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        {"text_config": INKLING2, "vision_config": INKLING_TOWER},
        exact=1e-5,
    ),
    "inkling2_loop": Family(
        "inkling2_loop",
        "Inkling2LoopForConditionalGeneration",
        {"text_config": INKLING2_LOOP, "vision_config": INKLING_TOWER},
        exact=1e-5,
    ),
    "glm5_next": Family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        {
            "text_config": {
                **LATENT,
                **GROUPED,
                "qk_rope_head_dim": 0,
                "index_topk": 8,
                "index_head_dim": 12,
                "index_n_heads": 4,
                "index_kpool": 4,
                "layer_types": ["linear_attention", "indexed_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "linear_head_dim": 12,
                "linear_num_heads": 4,
                "hc_mult": 2,
            },
            "vision_config": {**DEPTH, "image_size": 12, "projection_intermediate_size": 40},
            **SPECIAL_GLM,
        },
        exact=1e-5,
        since="5.24",
    ),
    "mistral_large4": Family(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        {
            "text_config": {
                **without(without(LATENT, "q_lora_rank"), "num_hidden_layers"),
                **GROUPED,
                **INDEXER,
                "vocab_size": 80,
                "num_hidden_layers": 3,
                "head_dim": 8,
            },
            "vision_config": PIXTRAL,
            "image_token_index": IMAGE,
        },
    ),
    "muse_spark": Family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                "layer_types": ["sliding_attention", "full_attention"],
                "layer_rope_theta": [1e4, 0],
                "sliding_window": 8,
                "moe_intermediate_size": 56,
                "moe_hidden_size": 40,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "vision_config": PATCHES,
            "audio_config": {
                "patch_sizes": [2, 2],
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 96,
            },
            "out_hidden_size": 128,
            "projector_hidden_size": 40,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
        },
    ),
    "qwen4_exp": Family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                **EXPERTS,
                "shared_expert_intermediate_size": 80,
                "rope_parameters": INTERLEAVED,
                "attention_bias": True,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 12,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "indexed_attention"],
                "hc_count": 2,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
            },
            "vision_config": {**DEPTH, "num_position_embeddings": 16},
            **SPECIAL,
        },
        exact=1e-5,
        since="5.24",
    ),
}
