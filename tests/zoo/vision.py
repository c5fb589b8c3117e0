"""Language models that see: an image amid the text of every row of the batch.

Text and towers differ in every size, so that a tower's module can't be taken for a decoder's.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from zoo import Family
from zoo.hybrid import SCANS

Inputs = dict[str, Tensor]
Sight = Callable[[nn.Module, torch.Generator], Inputs]

if transformers.__version__ == "5.24.0":
    # There Llama 4's forward ends by reading this from an output that does not have it.
    MoeCausalLMOutputWithPast.image_outputs = None

IMAGE, VIDEO, START, END, AUDIO = 70, 71, 72, 73, 74
"""Special tokens; text stays below 64."""

BEFORE, AFTER = 4, 5
"""Text tokens around the image."""


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings but one."""
    return {key: value for key, value in settings.items() if key != name}


def around(tokens: int, generator: torch.Generator) -> Inputs:
    """Ids of two rows with so many image tokens in each."""
    ids = torch.randint(3, 64, (2, BEFORE + tokens + AFTER), generator=generator)
    ids[:, BEFORE : BEFORE + tokens] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures(
    tokens: int, *shape: int, mark: str = "", sizes: tuple[int, int] | None = None
) -> Sight:
    """One picture for each row.

    Args:
        tokens: that the model makes of it.
        shape: of a row's pixels.
        mark: name of the input that tells image tokens from text, where the model asks for it.
        sizes: height and width, where the model asks for them.
    """

    def see(model: nn.Module, generator: torch.Generator) -> Inputs:
        result = around(tokens, generator)
        pixels = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        result["pixel_values"] = pixels.to(model.dtype)
        if sizes:
            result["image_sizes"] = torch.tensor([sizes] * 2)
        if mark:
            result[mark] = (result["input_ids"] == IMAGE).long()
        return result

    return see


def patches(height: int, width: int, features: int) -> Sight:
    """For each row a picture of so many patches, four of which become one token."""

    def see(model: nn.Module, generator: torch.Generator) -> Inputs:
        result = around(height * width // 4, generator)
        size = (2 * height * width, features)
        pixels = torch.randn(size, generator=generator, dtype=torch.float64)
        result["pixel_values"] = pixels.to(model.dtype)
        result["image_grid_thw"] = torch.tensor([[1, height, width]] * 2)
        result["mm_token_type_ids"] = (result["input_ids"] == IMAGE).long()
        return result

    return see


def look_and_listen(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 4 patches, four of which become one token, and a sound."""
    result = around(6, generator)
    result["input_ids"][:, BEFORE + 4 : BEFORE + 6] = AUDIO
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    result["image_position_ids"] = torch.stack([grid, grid])
    result["mm_token_type_ids"] = (result["input_ids"] == IMAGE).long()
    result["input_features_mask"] = torch.ones(2, 8, dtype=torch.bool)
    for name, shape in (("pixel_values", (2, 16, 12)), ("input_features", (2, 8, 16))):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        result[name] = values.to(model.dtype)
    return result


TEXT: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

WIDE: dict[str, Any] = {**TEXT, "head_dim": 16}
"""For models that do not take head_dim from the hidden size."""

TIES: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (False, True),
    "text_config.num_key_value_heads": (2, 1, 6, 3),
}

TIED: dict[str, tuple[Any, ...]] = {**TIES, "tie_word_embeddings": (True, False)}

FREE: dict[str, tuple[Any, ...]] = {**TIES, "text_config.hidden_size": (96, 48, 192)}
"""Where the projector takes the width of the text from its configuration."""

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
"""CLIP's and SigLIP's names: 16 patches."""

CLIP: dict[str, Any] = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 24}
SIGLIP: dict[str, Any] = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL: dict[str, Any] = {**TOWER, "model_type": "pixtral", "head_dim": 16}

DEPTH: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "out_hidden_size": 96,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
"""Qwen's names: a patch has 3 · 2 · 2 · 2 features."""

SPECIAL: dict[str, int] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

SPECIAL_GLM: dict[str, int] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": START,
    "video_end_token_id": END,
}


def rope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Positions in time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}


INTERLEAVED: dict[str, Any] = rope([4, 2, 2], mrope_interleaved=True)

LLAVA: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "vision_config": CLIP,
    "image_token_index": IMAGE,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

LLAVA_SIZES: dict[str, tuple[Any, ...]] = {**FREE, "multimodal_projector_bias": (True, False)}

ONEVISION: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "qwen2"},
    "vision_config": SIGLIP,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "image_grid_pinpoints": [[8, 8], [8, 16], [16, 16]],
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}

GEMMA: dict[str, Any] = {
    **WIDE,
    "num_hidden_layers": 3,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "attention_bias": True,
    "query_pre_attn_scalar": 16,
}

IDEFICS: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "vision_config": TOWER,
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}

COHERE: dict[str, Any] = {
    **WIDE,
    "model_type": "cohere2",
    "num_hidden_layers": 3,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "attention_bias": True,
}

EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 56,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": rope([2, 3, 3])},
            # Here the tower is as wide as embed_dim, and hidden_size is what it puts out.
            "vision_config": {
                "depth": 2,
                "num_heads": 2,
                "embed_dim": 32,
                "hidden_size": 96,
                "mlp_ratio": 2,
                "patch_size": 2,
            },
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        TIES,
        vision=patches(4, 6, 24),
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": rope([2, 3, 3]),
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "vision_config": {**DEPTH, "window_size": 8, "fullatt_block_indexes": [1]},
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        TIES,
        vision=patches(4, 6, 24),
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**WIDE, "rope_parameters": INTERLEAVED, "attention_bias": True},
            "vision_config": {
                **DEPTH,
                "depth": 3,
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 16,
            },
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        {**TIES, "vision_config.deepstack_visual_indexes": ([0, 1], [2], [])},
        vision=patches(4, 6, 24),
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                **EXPERTS,
                "rope_parameters": INTERLEAVED,
                "attention_bias": True,
                "mlp_only_layers": [0],
                "tie_word_embeddings": False,
            },
            "vision_config": {
                **DEPTH,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        {"text_config.num_experts_per_tok": (2, 1, 3), "text_config.mlp_only_layers": ([0], [])},
        vision=patches(4, 6, 24),
    ),
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                "rope_parameters": INTERLEAVED,
                "attention_bias": True,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 12,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": {**DEPTH, "num_position_embeddings": 16},
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        TIES,
        exact=SCANS,
        vision=patches(4, 6, 24),
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
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
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": {**DEPTH, "num_position_embeddings": 16},
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        TIES,
        exact=SCANS,
        vision=patches(4, 6, 24),
    ),
    "llava": Family(
        "llava",
        "LlavaForConditionalGeneration",
        LLAVA,
        LLAVA_SIZES,
        vision=pictures(16, 3, 8, 8),
    ),
    "llava_mistral": Family(
        "llava",
        "LlavaForConditionalGeneration",
        {
            **LLAVA,
            "text_config": {**WIDE, "model_type": "mistral", "sliding_window": 6},
            "vision_config": SIGLIP,
            "vision_feature_layer": [-2, -1],
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": True,
        },
        {**LLAVA_SIZES, "tie_word_embeddings": (True, False)},
        vision=pictures(16, 3, 8, 8),
    ),
    "llava_qwen2": Family(
        "llava",
        "LlavaForConditionalGeneration",
        {**LLAVA, "text_config": {**TEXT, "model_type": "qwen2"}},
        LLAVA_SIZES,
        vision=pictures(16, 3, 8, 8),
    ),
    "llava_next": Family(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        {**LLAVA, "image_grid_pinpoints": [[8, 8], [8, 16], [16, 16]]},
        LLAVA_SIZES,
        # The whole picture, and two pieces side by side with a newline behind each line.
        vision=pictures(16 + 4 * 9, 3, 3, 8, 8, sizes=(8, 16)),
    ),
    "llava_next_video": Family(
        "llava_next_video",
        "LlavaNextVideoForConditionalGeneration",
        {
            **LLAVA,
            "video_token_index": VIDEO,
            "spatial_pool_mode": "conv",
            "image_grid_pinpoints": [[8, 8], [8, 16], [16, 16]],
        },
        LLAVA_SIZES,
        vision=pictures(16 + 4 * 9, 3, 3, 8, 8, sizes=(8, 16)),
    ),
    "llava_onevision": Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        ONEVISION,
        LLAVA_SIZES,
        vision=pictures(16 + 4 * 9, 3, 3, 8, 8, sizes=(8, 16)),
    ),
    "gemma3": Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": GEMMA,
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        {
            **TIED,
            "text_config.hidden_size": (96, 48, 192),
            # A square projection: its layout does not show in its shape.
            "vision_config.hidden_size": (32, 96),
        },
        vision=pictures(4, 3, 8, 8, mark="token_type_ids"),
    ),
    "gemma4": Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **GEMMA,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 80,
                "global_head_dim": 24,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "use_bidirectional_attention": "vision",
            },
            "vision_config": {
                **without(TOWER, "image_size"),
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pooling_kernel_size": 2,
                "position_embedding_size": 8,
            },
            "audio_config": {
                "hidden_size": 32,
                # Its attention is float32 in parts and can't be built in float64.
                "num_hidden_layers": 0,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [16, 4],
                "attention_chunk_size": 4,
                "attention_context_left": 3,
                "output_proj_dims": 24,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
            "boi_token_id": START,
            "eoi_token_id": END,
        },
        {"tie_word_embeddings": (True, False), "text_config.hidden_size": (96, 48, 192)},
        vision=look_and_listen,
    ),
    "mistral3": Family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**WIDE, "model_type": "mistral", "sliding_window": None},
            "vision_config": PIXTRAL,
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "multimodal_projector_bias": True,
            "tie_word_embeddings": False,
        },
        {**TIES, "multimodal_projector_bias": (True, False)},
        vision=pictures(4, 3, 8, 8, sizes=(8, 8)),
    ),
    "internvl": Family(
        "internvl",
        "InternVLForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {
                **TOWER,
                "attention_bias": True,
                "use_qk_norm": True,
                "norm_type": "rms_norm",
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        FREE,
        vision=pictures(4, 3, 8, 8),
    ),
    "internvl_qwen3": Family(
        "internvl",
        "InternVLForConditionalGeneration",
        {
            "text_config": {**WIDE, "model_type": "qwen3", "attention_bias": True},
            "vision_config": {**TOWER, "use_mean_pooling": False},
            "image_token_id": IMAGE,
        },
        {**TIED, "text_config.hidden_size": (96, 48, 80)},
        vision=pictures(4, 3, 8, 8),
    ),
    "idefics3": Family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        IDEFICS,
        FREE,
        vision=pictures(4, 1, 3, 8, 8),
    ),
    "smolvlm": Family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        IDEFICS,
        FREE,
        vision=pictures(4, 1, 3, 8, 8),
    ),
    "aya_vision": Family(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        {
            "text_config": COHERE,
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
        },
        TIED,
        vision=pictures(4, 3, 8, 8),
    ),
    "cohere2_vision": Family(
        "cohere2_vision",
        "Cohere2VisionForConditionalGeneration",
        {
            "text_config": COHERE,
            "vision_config": SIGLIP,
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
        },
        TIED,
        vision=pictures(4, 3, 8, 8),
    ),
    "paligemma": Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**WIDE, "model_type": "gemma", "attention_bias": True},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "projection_dim": 96,
            "hidden_size": 96,
        },
        TIED,
        vision=pictures(16, 3, 8, 8),
    ),
    "paligemma2": Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**GEMMA, "model_type": "gemma2"},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "projection_dim": 96,
            "hidden_size": 96,
        },
        TIED,
        vision=pictures(16, 3, 8, 8),
    ),
    "llama4": Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                "num_hidden_layers": 4,
                "intermediate_size": 56,
                "intermediate_size_mlp": 112,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "no_rope_layer_interval": 4,
                "attention_chunk_size": 8,
                "attention_bias": True,
                "floor_scale": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                **TOWER,
                "intermediate_size": 128,
                "vision_output_dim": 24,
                "projector_input_dim": 24,
                "projector_output_dim": 24,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
            "tie_word_embeddings": False,
        },
        {
            "text_config.num_key_value_heads": (2, 1, 6, 3),
            "text_config.hidden_size": (96, 48, 80),
            "text_config.num_experts_per_tok": (1, 2),
            "text_config.interleave_moe_layer_step": (2, 1),
        },
        vision=pictures(4, 3, 8, 8),
    ),
    "glm4v": Family(
        "glm4v",
        "Glm4vForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": rope([2, 3, 3])},
            "vision_config": {**DEPTH, "image_size": 12, "attention_bias": True},
            "tie_word_embeddings": False,
            **SPECIAL_GLM,
        },
        TIES,
        vision=patches(4, 6, 24),
    ),
    "glm46v": Family(
        "glm46v",
        "Glm46VForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": rope([2, 3, 3]), "model_type": "glm4v_text"},
            "vision_config": {**DEPTH, "image_size": 12, "model_type": "glm4v_vision"},
            "tie_word_embeddings": False,
            **SPECIAL_GLM,
        },
        TIES,
        vision=patches(4, 6, 24),
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "rope_parameters": rope([1, 1, 2], partial_rotary_factor=0.5),
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 56,
                "num_experts_per_tok": 2,
                "n_routed_experts": 4,
                "attention_bias": True,
                "tie_word_embeddings": False,
            },
            "vision_config": {**DEPTH, "image_size": 12},
            "tie_word_embeddings": False,
            **SPECIAL_GLM,
        },
        {"text_config.num_experts_per_tok": (2, 1, 3), "text_config.attention_bias": (True, False)},
        vision=patches(4, 6, 24),
    ),
    "vipllava": Family(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layers": [-2, -1],
            "tie_word_embeddings": False,
        },
        FREE,
        vision=pictures(16, 3, 8, 8),
    ),
}
