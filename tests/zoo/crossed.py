"""Language models that see through attention to the image, or through tokens of it."""

from typing import Any

import torch
from torch import nn
from transformers.models.kosmos2 import modeling_kosmos2

from zoo import Family
from zoo.dense import DERIVED
from zoo.unrotated import Wide
from zoo.vision import (
    IMAGE,
    SIGLIP,
    TEXT,
    TIES,
    TOWER,
    VIDEO,
    Inputs,
    around,
    pictures,
    without,
)

modeling_kosmos2.torch = Wide()  # type: ignore[attr-defined]

CODES: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 8,
    "latent_channels": 8,
    "resolution": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
}

CHAMELEON: dict[str, Any] = {
    **DERIVED,
    "vq_config": CODES,
    "vocabulary_map": {"<image>": 63},
    "attention_bias": True,
    "mlp_bias": True,
}

CHAMELEON_SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 48),
    "num_key_value_heads": (2, 1, 6),
}

QFORMER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 1,
}

BLIP: dict[str, Any] = {
    "text_config": {
        "model_type": "opt",
        "vocab_size": 80,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "ffn_dim": 112,
        "num_attention_heads": 6,
        "word_embed_proj_dim": 96,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": TOWER,
    "qformer_config": QFORMER,
    "num_query_tokens": 4,
    "image_token_index": IMAGE,
}

BLIP_SIZES: dict[str, tuple[Any, ...]] = {"text_config.ffn_dim": (112, 56)}


KOSMOS: dict[str, Any] = {
    "vocab_size": 80,
    "embed_dim": 96,
    "layers": 2,
    "ffn_dim": 112,
    "attention_heads": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


IDEFICS: dict[str, Any] = {
    **without(DERIVED, "num_key_value_heads"),
    "alpha_initializer": "ones",
    "qk_layer_norms": True,
    "cross_layer_interval": 2,
    "vision_config": {**without(TOWER, "hidden_size"), "embed_dim": 32},
}


def seen(model: nn.Module, generator: torch.Generator) -> Inputs:
    """What the vision tower would say of a picture, for both rows."""
    result = around(0, generator)
    states = torch.randn(2, 5, 96, generator=generator, dtype=torch.float64)
    result["cross_attention_states"] = states.to(model.dtype)
    return result


def given(model: nn.Module, generator: torch.Generator) -> Inputs:
    """What the projection would say of a picture, in place of four tokens of each row."""
    result = around(4, generator)
    embeds = torch.randn(2, 4, 96, generator=generator, dtype=torch.float64)
    result["image_embeds"] = embeds.to(model.dtype)
    result["image_embeds_position_mask"] = (result["input_ids"] == IMAGE).long()
    return result


def encoded(model: nn.Module, generator: torch.Generator) -> Inputs:
    """What the vision tower would say of a picture, and which tokens may look at it: all."""
    result = around(0, generator)
    states = torch.randn(2, 1, 5, 32, generator=generator, dtype=torch.float64)
    result["image_encoder_embeddings"] = states.to(model.dtype)
    result["image_attention_mask"] = torch.ones(2, result["input_ids"].shape[1], 1)
    return result


def asked(frames: int = 0) -> Any:
    """For each row a picture of four tokens, or so many of a video, and what is asked about it."""
    shape = (frames, 3, 8, 8) if frames else (3, 8, 8)

    def see(model: nn.Module, generator: torch.Generator) -> Inputs:
        result = pictures(4 * max(frames, 1), *shape)(model, generator)
        question = torch.randint(3, 64, (2, 5), generator=generator)
        result["qformer_input_ids"] = question
        result["qformer_attention_mask"] = torch.ones_like(question)
        return result

    return see


def twice(model: nn.Module, generator: torch.Generator) -> Inputs:
    """A picture of 16 tokens for each row, also in a high resolution."""
    result = pictures(16, 3, 8, 8)(model, generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    result["high_res_pixel_values"] = pixels.to(model.dtype)
    return result


FAMILIES: dict[str, Family] = {
    "chameleon": Family(
        "chameleon", "ChameleonForConditionalGeneration", CHAMELEON, CHAMELEON_SIZES, ids=(3, 60)
    ),
    "chameleon_post": Family(
        "chameleon",
        "ChameleonForConditionalGeneration",
        {**CHAMELEON, "swin_norm": True},
        CHAMELEON_SIZES,
        ids=(3, 60),
    ),
    "emu3": Family(
        "emu3",
        "Emu3ForConditionalGeneration",
        {
            "text_config": TEXT,
            "vq_config": {
                "codebook_size": 8,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
            },
            "vocabulary_map": {"<image>": 70},
            "tie_word_embeddings": False,
        },
        TIES,
    ),
    "mllama": Family(
        "mllama",
        "MllamaForConditionalGeneration",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1], "tie_word_embeddings": False},
            "vision_config": {
                **without(without(TOWER, "num_attention_heads"), "image_size"),
                "attention_heads": 2,
                "image_size": 8,
                "num_global_layers": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE,
        },
        {"text_config.num_key_value_heads": (2, 1, 6)},
        vision=seen,
    ),
    "blip-2": Family(
        "blip-2",
        "Blip2ForConditionalGeneration",
        BLIP,
        BLIP_SIZES,
        vision=pictures(4, 3, 8, 8),
    ),
    "instructblip": Family(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        BLIP,
        BLIP_SIZES,
        vision=asked(),
    ),
    "instructblipvideo": Family(
        "instructblipvideo",
        "InstructBlipVideoForConditionalGeneration",
        {**BLIP, "video_token_index": IMAGE},
        BLIP_SIZES,
        vision=asked(2),
    ),
    "deepseek_vl_hybrid": Family(
        "deepseek_vl_hybrid",
        "DeepseekVLHybridForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": SIGLIP,
            "high_res_vision_config": {
                **without(TOWER, "intermediate_size"),
                "image_size": 32,
                "output_channels": 8,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 40,
                "model_type": "sam_vision_model",
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=twice,
    ),
    "fast_vlm": Family(
        "fast_vlm",
        "FastVlmForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**SIGLIP, "hidden_size": 16},  # as high as wide, like a CNN's pixels
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=pictures(16, 3, 8, 8),
    ),
    "perception_lm": Family(
        "perception_lm",
        "PerceptionLMForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**SIGLIP, "model_args": {"embed_dim": 32}},
            "vision_use_cls_token": False,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=pictures(16, 1, 3, 8, 8),
        since="5.24",
    ),
    "kosmos-2": Family(
        "kosmos-2",
        "Kosmos2ForConditionalGeneration",
        {"text_config": KOSMOS, "vision_config": TOWER, "latent_query_num": 4},
        vision=given,
        since="5.24",  # an earlier loader makes its row of padding zero
    ),
    "kosmos-2.5": Family(
        "kosmos-2.5",
        "Kosmos2_5ForConditionalGeneration",
        {
            "text_config": KOSMOS,
            "vision_config": {
                "hidden_size": 32,
                "patch_embed_hidden_size": 12,
                "intermediate_size": 40,
                "head_dim": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_num_patches": 16,
            },
            "latent_query_num": 4,
        },
        vision=given,
    ),
    "janus": Family(
        "janus",
        "JanusForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {
                **without(TOWER, "intermediate_size"),
                "mlp_ratio": 1.25,
                "projection_dim": 96,
                "num_image_tokens": 16,
            },
            "vq_config": {**CODES, "image_token_embed_dim": 96, "projection_dim": 96},
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        {**TIES, "vision_config.depth": (2, 2, 3), "vq_config.num_hidden_layers": (2, 2, 1)},
        vision=pictures(16, 3, 8, 8),
        unread=(  # where it reads a picture; tests/test_exact.py lets it draw
            "generation_head.proj_out.weight",
            "generation_aligner.hidden_layers.0.weight",
            "generation_aligner.hidden_layers.0.bias",
        ),
    ),
    "idefics": Family("idefics", "IdeficsForVisionText2Text", IDEFICS, vision=encoded),
    "idefics_more_tokens": Family(
        "idefics",
        "IdeficsForVisionText2Text",
        {**IDEFICS, "additional_vocab_size": 2},
        vision=encoded,
    ),
}
