"""Language models that see, hear or read proteins, with language models of their own."""

from typing import Any

import torch
from torch import nn
from transformers.models.timm_wrapper import modeling_timm_wrapper

from zoo import Family
from zoo.dense import GEMMA3N
from zoo.experts import DERIVED as DERIVED_EXPERTS
from zoo.hybrid import NEMOTRON
from zoo.vision import (
    AUDIO,
    BEFORE,
    CLIP,
    DEPTH,
    END,
    FREE,
    IMAGE,
    INTERLEAVED,
    SPECIAL,
    START,
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

# Gemma 3n's tower is of a package that the tests do without: nothing in it is rotated.
modeling_timm_wrapper.requires_backends = lambda *_: None
modeling_timm_wrapper._create_timm_model_with_error_handling = lambda *_, **__: nn.Linear(2, 2)


def masked(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 16 patches, of which a projector makes four tokens."""
    result = pictures(4, 3, 8, 8)(model, generator)
    result["pixel_mask"] = torch.ones(2, 8, 8, dtype=torch.bool)
    return result


def typed(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 6 patches, whose tokens have experts of their own."""
    result = patches(4, 6, 12)(model, generator)
    result["moe_mm_token_type_ids"] = result["mm_token_type_ids"]
    return result


def lined(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 6 patches: two lines of three tokens, and three marks."""
    result = patches(4, 6, 12)(model, generator)
    return {**result, **typed_ids(around(10, generator))}


def typed_ids(given: Inputs) -> Inputs:
    """With what tells image tokens from text."""
    return {**given, "mm_token_type_ids": (given["input_ids"] == IMAGE).long()}


def heard(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 4 patches, four of which become one token, and a sound."""
    result = around(6, generator)
    result["input_ids"][:, BEFORE + 4 : BEFORE + 6] = AUDIO
    result["image_grid_hw"] = torch.tensor([[4, 4]] * 2)
    result["input_features_mask"] = torch.ones(2, 16, dtype=torch.bool)
    for name, shape in (("pixel_values", (32, 12)), ("input_features", (2, 16, 8))):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        result[name] = values.to(model.dtype)
    return result


def sounds(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a sound of two tokens."""
    result = around(2, generator)
    result["input_ids"][:, BEFORE : BEFORE + 2] = AUDIO
    result["audio_embed_sizes"] = torch.tensor([2, 2])
    result["audio_attention_mask"] = torch.ones(2, 16, dtype=torch.bool)
    sound = torch.randn(2, 16, 8, generator=generator, dtype=torch.float64)
    result["audio_input_features"] = sound.to(model.dtype)
    return result


def sights_and_sounds(model: nn.Module, generator: torch.Generator) -> Inputs:
    """As ``sounds``, and a picture of 13 tokens: whole, in one piece, and marks between."""
    result = {**sounds(model, generator), **around(15, generator)}
    result["input_ids"][:, BEFORE + 13 : BEFORE + 15] = AUDIO
    result["image_sizes"] = torch.tensor([[8, 8]] * 2)
    result["image_attention_mask"] = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    pixels = torch.randn(2, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    result["image_pixel_values"] = pixels.to(model.dtype)
    return result


PHI4: dict[str, Any] = {
    **TEXT,
    "vision_config": {**TOWER, "crop_size": 8, "image_token_id": IMAGE},
    "audio_config": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "input_size": 8,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 8,
        "audio_token_id": AUDIO,
    },
    "tie_word_embeddings": False,
}

PHI4_SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 48, 192),
    "num_key_value_heads": (2, 1, 6, 3),
    "tie_word_embeddings": (False, True),
}


def read(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row of text a protein of ten residues."""
    ids = torch.randint(3, 64, (2, 12), generator=generator)
    proteins = torch.randint(5, 24, (2, 10), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "protein_input_ids": proteins,
        "protein_attention_mask": torch.ones_like(proteins),
    }


FAMILIES: dict[str, Family] = {
    "apertus1p5": Family(
        "apertus1p5",
        "Apertus1p5ForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "vocab_size": 96,
                "output_vocab_size": 64,
                "attention_bias": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                "codebook_size": 8,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "resolution": 8,
            },
            "audio_config": {
                "model_type": "wavtokenizer_encoder",
                "num_filters": 4,
                "upsampling_ratios": [2, 2],
                "num_lstm_layers": 1,
                "hidden_size": 8,
                "codebook_size": 8,
                "codebook_dim": 8,
            },
            "image_token_id": IMAGE,
            "audio_token_id": AUDIO,
            "image_token_offset": 80,
            "audio_token_offset": 88,
            "tie_word_embeddings": False,
        },
        {"text_config.num_key_value_heads": (2, 1, 6), "text_config.hidden_size": (96, 48)},
    ),
    "aria_text": Family(
        "aria_text",
        "AriaTextForCausalLM",
        {
            **without(DERIVED_EXPERTS, "num_experts_per_tok"),
            "intermediate_size": 56,
            "moe_num_experts": 4,
            "attention_bias": True,
        },
        {
            "hidden_size": (96, 48, 192),
            "num_key_value_heads": (2, 1, 6, 3),
            "tie_word_embeddings": (False, True),
        },
        since="5.24",
    ),
    "aria": Family(
        "aria",
        "AriaForConditionalGeneration",
        {
            "text_config": {**TEXT, "intermediate_size": 56, "moe_num_experts": 4},
            "vision_config": {**TOWER, "model_type": "idefics3_vision"},
            "projector_patch_to_query_dict": {16: 4},
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        FREE,
        vision=masked,
        since="5.24",
    ),
    "ernie4_5_vl_moe": Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "use_bias": True,
                "moe_intermediate_size": [56, 40],
                "moe_num_experts": 4,
                "moe_k": 2,
                "rope_parameters": rope([3, 3, 2]),
            },
            "vision_config": {
                **without(without(DEPTH, "out_hidden_size"), "temporal_patch_size"),
            },
            "tie_word_embeddings": False,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
        },
        {**TIES, "text_config.moe_k": (2, 1, 3), "text_config.use_bias": (True, False)},
        vision=typed,
    ),
    "nemotron_h_omni": Family(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        {
            "text_config": {
                **NEMOTRON,
                "model_type": "nemotron_h",
                "vocab_size": 80,
                "num_nextn_predict_layers": 1,
            },
            "vision_config": {
                **without(TOWER, "intermediate_size"),
                "model_type": "radio",
                "mlp_ratio": 1.25,
                "max_img_size": 16,
                "num_cls_tokens": 1,
                "num_registers": 1,
                "video_temporal_patch_size": 2,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 8,
                "subsampling_conv_channels": 8,
                "projection_hidden_size": 24,
                "projection_bias": True,
            },
            "vision_hidden_size": 32,
            "projector_hidden_size": 40,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
        },
        {"text_config.num_key_value_heads": (2, 1, 6), "text_config.hidden_size": (96, 48)},
        vision=heard,
    ),
    "phi4_multimodal": Family(
        "phi4_multimodal",
        "Phi4MultimodalForCausalLM",
        PHI4,
        PHI4_SIZES,
        vision=sights_and_sounds,
        unread=("down_proj_for_speech.weight", "down_proj_for_speech.bias"),
    ),
    "phi4_multimodal_sound": Family(
        "phi4_multimodal",
        "Phi4MultimodalForCausalLM",
        PHI4,
        PHI4_SIZES,
        vision=sounds,
        unread=tuple(
            f"{name}.{part}"
            for name in ("down_proj_for_vision_speech", "img_projection_down")
            for part in ("weight", "bias")
        ),
    ),
    "granite4_vision": Family(
        "granite4_vision",
        "Granite4VisionForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "num_hidden_layers": 5,
                "attention_bias": True,
                "attention_multiplier": 0.25,
                "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5,
            },
            "vision_config": {**CLIP, "hidden_size": 64},
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 64,
                "encoder_hidden_size": 64,
                "intermediate_size": 40,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            },
            "image_token_index": IMAGE,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 4]],
            "spatial_vision_layer": -1,
            "spatial_target_layers": [0, 1, 2, 3],
            "image_grid_pinpoints": [[8, 8], [8, 16], [16, 16]],
            "tie_word_embeddings": False,
        },
        FREE,
        vision=pictures(4 + 2 * 5, 3, 3, 8, 8, sizes=(8, 16)),
    ),
    "hunyuan_vl": Family(
        "hunyuan_vl",
        "HunYuanVLForConditionalGeneration",
        {
            "text_config": {**WIDE, "attention_bias": True, "rope_parameters": rope([2, 3, 3])},
            "vision_config": {**without(TOWER, "image_size"), "max_image_size": 8},
            "image_token_id": IMAGE,
            "im_start_id": START,
            "im_end_id": END,
            "im_newline_id": 75,
            "tie_word_embeddings": False,
        },
        FREE,
        vision=lined,
    ),
    "cohere_compass": Family(
        "cohere_compass",
        "CohereCompassForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "attention_bias": True,
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 8,
                "rope_parameters": {
                    "full_attention": None,
                    "sliding_attention": {**INTERLEAVED, "mrope_section": [2, 3, 3]},
                },
            },
            "vision_config": {
                **DEPTH,
                "depth": 3,
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 16,
            },
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        TIES,
        vision=patches(4, 6, 24),
    ),
    "gemma3n": Family(
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        {
            "text_config": {**WIDE, **GEMMA3N, "vocab_size_per_layer_input": 80},
            "vision_config": {"hidden_size": 32, "vocab_offset": 64, "vocab_size": 8},
            "audio_config": {
                "hidden_size": 32,
                "vocab_offset": 72,
                "vocab_size": 8,
                "input_feat_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [8, 4],
            },
            "image_token_id": IMAGE,
            "audio_token_id": AUDIO,
        },
    ),
    "evolla": Family(
        "evolla",
        "EvollaForProteinText2Text",
        {
            **TEXT,
            "attention_bias": True,
            "mlp_bias": True,
            "protein_encoder_config": {
                "vocab_size": 24,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 40,
            },
            "aligner_ffn_mult": 1,
            "aligner_num_add_layers": 1,
            "resampler_depth": 1,
            "resampler_dim_head": 8,
            "resampler_heads": 2,
            "resampler_num_latents": 4,
            "resampler_ff_mult": 1,
        },
        {
            "hidden_size": (96, 48, 192),
            "num_key_value_heads": (2, 1, 6),
            "aligner_num_add_layers": (1, 2),
            "aligner_enable_bias": (True, False),
        },
        vision=read,
    ),
}
