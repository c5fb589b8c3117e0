"""Language models that see, each with a projector of its own."""

from inspect import signature
from typing import Any

import torch
from torch import nn

from zoo import Family
from zoo.experts import GROUPED
from zoo.experts import LATENT as LATENT_TEXT
from zoo.hybrid import SCANS
from zoo.sight import QWEN3
from zoo.vision import (
    BEFORE,
    FREE,
    IMAGE,
    SPECIAL,
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

LINEAR: dict[str, Any] = {
    **WIDE,
    "model_type": "qwen3_5_text",
    "attention_bias": True,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

MINICPM: dict[str, Any] = {
    "text_config": LINEAR,
    "vision_config": {**TOWER, "insert_layer_id": 0},
    "insert_layer_id": 0,
    "image_size": 8,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "tie_word_embeddings": False,
}


def marked(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 6 patches, four of which become one token."""
    result = patches(4, 6, 24)(model, generator)
    pixels = result["pixel_values"]
    result["pixel_values"] = pixels[:, :12].reshape(-1, 3, 2, 2)
    return result


def one_by_one(model: nn.Module, generator: torch.Generator) -> Inputs:
    """The same for a model that needs no word on which tokens are of the picture."""
    return without(marked(model, generator), "mm_token_type_ids")


def in_a_row(side: int) -> Any:
    """For each row a picture of 4 · 4 patches, side · side of which become one token."""

    def see(model: nn.Module, generator: torch.Generator) -> Inputs:
        result = around(16 // side**2, generator)
        pixels = torch.randn(1, 3, 2, 64, generator=generator, dtype=torch.float64)
        result["pixel_values"] = pixels.to(model.dtype)
        result["target_sizes"] = torch.tensor([[4, 4]] * 2)
        if "mm_token_type_ids" in signature(model.forward).parameters:
            result["mm_token_type_ids"] = (result["input_ids"] == IMAGE).long()
        return result

    return see


def merged(model: nn.Module, generator: torch.Generator) -> Inputs:
    """Pictures for a model that is told how many patches become one token."""
    result = one_by_one(model, generator)
    result["image_merge_sizes"] = torch.tensor([2, 2])
    return result


def in_words(model: nn.Module, generator: torch.Generator) -> Inputs:
    """A picture of 16 tokens, and a token that says what follows."""
    result = pictures(16, 3, 8, 8)(model, generator)
    result["input_ids"][:, BEFORE - 1] = 75
    return result


def flat(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row 6 patches of 12 values."""
    result = around(6, generator)
    pixels = torch.randn(2, 6, 12, generator=generator, dtype=torch.float64)
    result["pixel_values"] = pixels.to(model.dtype)
    return result


def heard(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a sound of 16 frames, four of which become one token."""
    result = around(2, generator)
    sound = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    result["input_features"] = sound.to(model.dtype)
    result["input_features_mask"] = torch.ones(2, 16, dtype=torch.long)
    return result


FAMILIES: dict[str, Family] = {
    "kimi_k25": Family(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        {
            "text_config": {
                **LATENT_TEXT,
                **GROUPED,
                "vocab_size": 80,
                "first_k_dense_replace": 1,
                "model_type": "deepseek_v3",
            },
            "vision_config": {**TOWER, "pos_emb_height": 4, "pos_emb_width": 4},
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        {"text_config.hidden_size": (96, 48)},
        vision=one_by_one,
    ),
    "minicpmv4_6": Family(
        "minicpmv4_6",
        "MiniCPMV4_6ForConditionalGeneration",
        MINICPM,
        FREE,
        SCANS,
        vision=in_a_row(4),
    ),
    "minicpmv4_7": Family(
        "minicpmv4_7",
        "MiniCPMV4_7ForConditionalGeneration",
        {
            **MINICPM,
            "image_start_id": 72,
            "image_end_id": 73,
            "slice_start_id": 74,
            "slice_end_id": 75,
            "newline_id": 76,
        },
        FREE,
        SCANS,
        vision=in_a_row(4),
    ),
    "minicpm_ocr": Family(
        "minicpm_ocr",
        "MiniCPMOcrForConditionalGeneration",
        without(without(MINICPM, "image_size"), "insert_layer_id"),
        FREE,
        SCANS,
        vision=in_a_row(2),
    ),
    "ovis2": Family(
        "ovis2",
        "Ovis2ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**TOWER, "vocab_size": 40},
            "hidden_size": 96,
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [75, 76, 77, 78, 79],
            "vocab_size": 80,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=in_words,
    ),
    "paddleocr_vl": Family(
        "paddleocr_vl",
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": {**WIDE, "rope_parameters": rope([2, 3, 3]), "use_bias": True},
            "vision_config": {**TOWER, "spatial_merge_size": 2},
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        FREE,
        vision=marked,
    ),
    "video_llama_3": Family(
        "video_llama_3",
        "VideoLlama3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": without(TOWER, "image_size"),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        FREE,
        vision=merged,
    ),
    "fuyu": Family(
        "fuyu",
        "FuyuForCausalLM",
        {
            "text_config": {**without(TEXT, "num_key_value_heads"), "model_type": "persimmon"},
            "image_size": 8,
            "patch_size": 2,
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        {"text_config.hidden_size": (96, 48, 192)},
        1e-12,
        vision=flat,
        since="5.24",
    ),
    "idefics2": Family(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        {
            "text_config": {**WIDE, "model_type": "mistral"},
            "vision_config": TOWER,
            "perceiver_config": {
                "hidden_size": 96,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 12,
                "num_key_value_heads": 1,
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=pictures(4, 1, 3, 8, 8),
    ),
    "moss_transcribe_diarize": Family(
        "moss_transcribe_diarize",
        "MossTranscribeDiarizeForConditionalGeneration",
        {
            "text_config": QWEN3,
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 40,
                "num_mel_bins": 8,
                "max_source_positions": 8,
            },
            "audio_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        FREE,
        vision=heard,
    ),
    "deepseek_ocr2": Family(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                **GROUPED,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "attention_bias": True,
            },
            "vision_config": {
                "sam_config": {
                    **without(TOWER, "intermediate_size"),
                    "image_size": 32,
                    "output_channels": 8,
                    "downsample_channels": [16, 32],
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "mlp_dim": 40,
                },
                "encoder_config": {
                    "hidden_size": 32,
                    "intermediate_size": 40,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                },
            },
            "image_token_id": IMAGE,
        },
        {"text_config.num_key_value_heads": (2, 1, 6)},
        vision=pictures(145, 3, 32, 32),
    ),
}
