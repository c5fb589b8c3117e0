"""Language models that see or hear, with language models that no other family has."""

from typing import Any

import torch
from torch import nn

from zoo import Family
from zoo.experts import GROUPED
from zoo.experts import LATENT as LATENT_TEXT
from zoo.readers import one_by_one
from zoo.sight import WINDOWS, grids
from zoo.vision import (
    AUDIO,
    BEFORE,
    DEPTH,
    EXPERTS,
    FREE,
    GEMMA,
    IMAGE,
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


def listened(frames: int, tokens: int) -> Any:
    """For each row a picture of 4 · 6 patches, four of which become one token, and a sound."""

    def see(model: nn.Module, generator: torch.Generator) -> Inputs:
        result = grids(model, generator)
        ids = result["input_ids"]
        ids[:, BEFORE - 1] = START
        ids = torch.cat([ids[:, :-2], torch.full((2, tokens), AUDIO), ids[:, -2:]], 1)
        result |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sound = torch.randn(2, 8, frames, generator=generator, dtype=torch.float64)
        result["input_features"] = sound.to(model.dtype)
        result["feature_attention_mask"] = torch.ones(2, frames, dtype=torch.long)
        return result

    return see


def tiles(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of one tile, which becomes four tokens."""
    result = pictures(4, 1, 3, 8, 8)(model, generator)
    result["pixel_attention_mask"] = torch.ones(2, 1, dtype=torch.bool)
    return result


def embedded(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of four patches and a sound of two frames, all of them tokens."""
    result = around(6, generator)
    result["input_ids"][:, BEFORE + 4 : BEFORE + 6] = AUDIO
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    result["image_position_ids"] = torch.stack([grid, grid])
    result["mm_token_type_ids"] = (result["input_ids"] == IMAGE).long()
    result["input_features_mask"] = torch.ones(2, 2, dtype=torch.bool)
    for name, shape in (("pixel_values", (2, 4, 48)), ("input_features", (2, 2, 16))):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        result[name] = values.to(model.dtype)
    return result


def recorded(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 4 · 6 patches and a sound of two tokens."""
    result = one_by_one(model, generator)
    ids = result["input_ids"]
    ids = torch.cat([ids[:, :-2], torch.full((2, 2), AUDIO), ids[:, -2:]], 1)
    result |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sound = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    result["input_features"] = sound.to(model.dtype)
    result["chunk_sample_lengths"] = torch.tensor([32, 32])
    return result


def pooled(model: nn.Module, generator: torch.Generator) -> Inputs:
    """For each row a picture of 16 patches, four of which are pooled into one token."""
    result = around(4, generator)
    pixels = torch.randn(2, 16, 12, generator=generator, dtype=torch.float64)
    result["pixel_values"] = pixels.to(model.dtype)
    result["image_token_pooling"] = torch.arange(32).view(8, 4)
    result["image_grids"] = torch.tensor([[2, 2, 0, 0]] * 2)
    result["mm_token_type_ids"] = (result["input_ids"] == IMAGE).long()
    return result


ADAPTER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

MOLMO: dict[str, Any] = {
    "text_config": {**WIDE, "additional_vocab_size": 0, "rope_scaling_layers": [0, 1]},
    "vision_config": {
        **ADAPTER,
        "num_hidden_layers": 2,
        "image_size": [8, 8],
        "patch_size": 2,
        "num_position_embeddings": 16,
    },
    "adapter_config": {**ADAPTER, "text_hidden_size": 96, "vision_feature_layer": [-1, -2]},
    "image_patch_id": IMAGE,
    "image_start_token_id": 72,
    "low_res_image_start_token_id": 73,
    "image_end_token_id": 74,
    "frame_start_token_id": 75,
    "frame_end_token_id": 76,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, Family] = {
    "cosmos3_edge": Family(
        "cosmos3_edge",
        "Cosmos3EdgeForConditionalGeneration",
        {
            "text_config": {**WIDE, "rope_parameters": rope([4, 2, 2]), "mlp_bias": True},
            "vision_config": {**without(TOWER, "image_size"), "num_patches": 16},
            "projector_hidden_size": 40,
            "tie_word_embeddings": False,
            **SPECIAL,
        },
        FREE,
        vision=patches(4, 6, 12),
    ),
    "muse_glimmer": Family(
        "muse_glimmer",
        "MuseGlimmerForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                "layer_types": ["sliding_attention", "full_attention"],
                "layer_rope_theta": [1e4, 0],
                "sliding_window": 8,
            },
            "vision_config": {
                **without(TOWER, "image_size"),
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "layer_types": ["window_attention", "full_attention"],
            },
            "out_hidden_size": 128,
            "projector_hidden_size": 40,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        {"text_config.hidden_size": (96, 48, 192)},
        vision=grids,
    ),
    "granite_docling": Family(
        "granite_docling",
        "GraniteDoclingForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "attention_bias": True,
                "attention_multiplier": 0.25,
                "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5,
            },
            "vision_config": {
                **TOWER,
                "scale_factor": 2,
                "out_hidden_size": 96,
                "deepstack_visual_indexes": [0],
                "use_fine_route": False,
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=tiles,
    ),
    "gemma4_unified": Family(
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": {**without(GEMMA, "query_pre_attn_scalar"), "num_kv_shared_layers": 0},
            "vision_config": {
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "output_proj_dims": 32,
                "mm_posemb_size": 4,
            },
            "audio_config": {"output_proj_dims": 16},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
        },
        {"tie_word_embeddings": (True, False), "text_config.hidden_size": (96, 48, 192)},
        vision=embedded,
    ),
    "qwen2_5_omni_thinker": Family(
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": rope([2, 3, 3])},
            "vision_config": WINDOWS,
            "audio_config": {
                "num_mel_bins": 8,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 40,
                "d_model": 32,
                "n_window": 4,
                "max_source_positions": 16,
                "output_dim": 96,
            },
            "audio_token_index": AUDIO,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "vision_start_token_id": START,
            "tie_word_embeddings": False,
        },
        TIES,
        vision=listened(16, 4),
        since="5.24",
    ),
    "qwen3_omni_moe_thinker": Family(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                **EXPERTS,
                "rope_parameters": rope([4, 2, 2]),
                "attention_bias": True,
                "mlp_only_layers": [0],
            },
            "vision_config": {
                **DEPTH,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "audio_config": {
                "num_mel_bins": 8,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 40,
                "d_model": 32,
                "n_window_infer": 100,
                "downsample_hidden_size": 8,
                "max_source_positions": 16,
                "output_dim": 96,
            },
            "audio_token_id": AUDIO,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "tie_word_embeddings": False,
        },
        {"text_config.num_key_value_heads": (2, 1, 6)},
        vision=listened(40, 5),
        since="5.24",
    ),
    "dots3_note": Family(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        {
            "text_config": {
                **LATENT_TEXT,
                **GROUPED,
                "vocab_size": 80,
                "head_dim": 32,
                "index_topk": 5,
                "index_head_dim": 12,
                "index_n_heads": 4,
                "layer_types": ["indexed_attention", "sliding_attention"],
                "sliding_window": 8,
                "mlp_layer_types": ["dense", "sparse"],
                "shared_experts_intermediate_size": 80,
                "per_layer_config": {1: {"num_attention_heads": 3, "num_key_value_heads": 3}},
            },
            "vision_config": {
                **without(TOWER, "image_size"),
                "mlp_layer_types": ["dense", "dense"],
                "per_layer_config": {},
                "adapter_in_dim": 32,
                "adapter_out_dim": 96,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "feature_size": 8,
                "downsample_hidden_size": 8,
                "conv_output_size": 8,
                "adapter_input_size": 32,
                "adapter_out_dim": 96,
                "hop_length": 2,
                "samples_per_token": 16,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
        },
        vision=recorded,
    ),
    "molmo2": Family("molmo2", "Molmo2ForConditionalGeneration", MOLMO, vision=pooled),
    "molmo2_post": Family(
        "molmo2",
        "Molmo2ForConditionalGeneration",
        {**MOLMO, "text_config": {**MOLMO["text_config"], "norm_after": True}},
        vision=pooled,
    ),
    "unlimited_ocr": Family(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                **GROUPED,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["reference_sliding_attention"] * 2,
                "sliding_window": 8,
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
                "encoder_config": TOWER,
            },
            "image_token_id": IMAGE,
        },
        {"text_config.num_key_value_heads": (2, 1, 6)},
        vision=pictures(21, 3, 32, 32),
    ),
    "step3p7": Family(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        {
            "text_config": {
                **WIDE,
                "moe_intermediate_size": 56,
                "share_expert_dim": 80,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 8,
                "num_sliding_attention_heads": 8,
                "attention_bias": True,
                "query_pre_attn_scalar": 16,
                "rope_parameters": {
                    name: {"rope_type": "default", "rope_theta": 1e4}
                    for name in ("full_attention", "sliding_attention")
                },
            },
            "vision_config": {**TOWER, "image_size": 16},
            "projector_bias": True,
            "image_token_id": IMAGE,
        },
        {"text_config.num_key_value_heads": (2, 1)},
        vision=pictures(4, 3, 16, 16),
    ),
}
