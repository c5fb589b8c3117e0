"""More language models that see: readers of documents, and those that share a projector's shape."""

from inspect import signature
from typing import Any

import torch
from torch import nn

from zoo import Family
from zoo.experts import SLIDING
from zoo.vision import (
    CLIP,
    DEPTH,
    EXPERTS,
    FREE,
    IMAGE,
    INTERLEAVED,
    LLAVA,
    PIXTRAL,
    SIGLIP,
    SPECIAL,
    SPECIAL_GLM,
    TEXT,
    TIES,
    TOWER,
    VIDEO,
    WIDE,
    Inputs,
    around,
    patches,
    pictures,
    rope,
    without,
)

WINDOWS: dict[str, Any] = {**DEPTH, "window_size": 8, "fullatt_block_indexes": [1]}
QWEN3: dict[str, Any] = {**WIDE, "model_type": "qwen3", "attention_bias": True}

GOT: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "qwen2"},
    "vision_config": {
        **without(TOWER, "intermediate_size"),
        "image_size": 32,
        "output_channels": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 40,
    },
    "image_token_index": IMAGE,
    "tie_word_embeddings": False,
}

GLM: dict[str, Any] = {
    "vision_config": {**DEPTH, "image_size": 12, "model_type": "glm4v_vision"},
    "tie_word_embeddings": False,
    **SPECIAL_GLM,
}


def in_patches(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 4 patches of 12 values, four of which become one token."""
    result = around(4, generator)
    pixels = torch.randn(2, 16, 12, generator=generator, dtype=torch.float64)
    result["pixel_values"] = pixels.to(model.dtype)
    result["spatial_shapes"] = torch.tensor([[4, 4]] * 2)
    result["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
    return result


def plain(model: nn.Module, generator: torch.Generator) -> Inputs:
    """A picture of 16 tokens for each row, by the name that this transformers has for it."""
    result = pictures(16, 3, 8, 8)(model, generator)
    if "pixel_values" not in signature(model.forward).parameters:
        result["pixel_values_images"] = result.pop("pixel_values")
    return result


def grids(model: nn.Module, generator: torch.Generator) -> Inputs:
    """Patches for a model that needs no word on which tokens are of the picture."""
    return without(patches(4, 6, 24)(model, generator), "mm_token_type_ids")


def _seeing(model_type: str, model_class: str, config: dict[str, Any], vision: Any) -> Family:
    name = f"{model_class}ForConditionalGeneration"
    return Family(model_type, name, config, TIES, vision=vision)


FAMILIES: dict[str, Family] = {
    "qianfan_ocr": _seeing(
        "qianfan_ocr",
        "QianfanOCR",
        {"text_config": QWEN3, "vision_config": TOWER, "image_token_id": IMAGE},
        pictures(4, 3, 8, 8),
    ),
    "deepseek_vl": _seeing(
        "deepseek_vl",
        "DeepseekVL",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": SIGLIP,
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        pictures(16, 3, 8, 8),
    ),
    "lighton_ocr": _seeing(
        "lighton_ocr",
        "LightOnOcr",
        {"text_config": QWEN3, "vision_config": PIXTRAL, "image_token_id": IMAGE},
        pictures(4, 3, 8, 8, sizes=(8, 8)),
    ),
    "video_llava": _seeing(
        "video_llava",
        "VideoLlava",
        {
            **without(LLAVA, "vision_feature_layer"),
            "vision_config": CLIP,
            "video_token_index": VIDEO,
            "tie_word_embeddings": False,
        },
        plain,
    ),
    "got_ocr2": _seeing("got_ocr2", "GotOcr2", GOT, pictures(16, 3, 32, 32)),
    "pp_chart2table": _seeing("pp_chart2table", "GotOcr2", GOT, pictures(16, 3, 32, 32)),
    "lfm2_vl": _seeing(
        "lfm2_vl",
        "Lfm2Vl",
        {
            "text_config": {
                **TEXT,
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"],
            },
            "vision_config": {
                **without(TOWER, "image_size"),
                "model_type": "siglip2_vision_model",
                "num_patches": 16,
                "vision_use_head": False,
            },
            "image_token_id": IMAGE,
            "projector_hidden_size": 40,
            "tie_word_embeddings": False,
        },
        in_patches,
    ),
    "lfm3_vl": _seeing(
        "lfm3_vl",
        "Lfm3Vl",
        {
            "text_config": {**WIDE, "layer_types": ["conv", "full_attention"]},
            "vision_config": {
                **without(TOWER, "image_size"),
                "num_key_value_heads": 2,
                "temporal_patch_size": 2,
            },
            "projector_hidden_size": 40,
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        grids,
    ),
    "exaone4_5": _seeing(
        "exaone4_5",
        "Exaone4_5_",
        {
            "text_config": {**WIDE, **SLIDING, "model_type": "exaone4"},
            "vision_config": {**WINDOWS, "num_key_value_heads": 1},
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        grids,
    ),
    "hyperclovax_vision_v2": Family(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        {
            "text_config": {**WIDE, "model_type": "hyperclovax"},
            "vision_config": {**WINDOWS, "out_hidden_size": 40, "model_type": "qwen2_5_vl_vision"},
            "tie_word_embeddings": False,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        FREE,
        vision=grids,
    ),
    "cosmos3_omni": _seeing(
        "cosmos3_omni",
        "Cosmos3Omni",
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
        patches(4, 6, 24),
    ),
    "glmga": _seeing(
        "glmga",
        "Glm46V",
        {
            **GLM,
            "text_config": {**TEXT, "rope_parameters": rope([2, 3, 3]), "model_type": "glm4v_text"},
        },
        patches(4, 6, 24),
    ),
    "glm_ocr": _seeing(
        "glm_ocr",
        "GlmOcr",
        {
            **GLM,
            "text_config": {**WIDE, "rope_parameters": rope([2, 3, 3])},
            "vision_config": {**DEPTH, "attention_bias": True},
        },
        patches(4, 6, 24),
    ),
    "minimax_m3_vl": Family(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                **without(EXPERTS, "num_experts"),
                "intermediate_size": 56,
                "dense_intermediate_size": 112,
                "shared_intermediate_size": 80,
                "num_local_experts": 4,
                "mlp_layer_types": ["dense", "sparse"],
                "rotary_dim": 8,
            },
            "vision_config": {**TOWER, "num_attention_heads": 1},
            "projector_hidden_size": 40,
            "merged_hidden_size": 384,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "tie_word_embeddings": False,
        },
        vision=grids,
    ),
}
