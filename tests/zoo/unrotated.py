"""Decoders whose residual stream no rotation can pass."""

from typing import Any

import torch
from transformers.models.xglm import modeling_xglm

from zoo import Family
from zoo.dense import COMMON, DERIVED
from zoo.experts import GROUPED, LATENT, without
from zoo.layernorm import GPT, TIED


class Wide:
    """torch for a model that puts the smallest float64 into a float32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def full(size: tuple[int, ...], value: float, **settings: Any) -> torch.Tensor:
        """As ``torch.full``, wide enough for the value."""
        return torch.full(size, value, **{"dtype": torch.float64, **settings})


modeling_xglm.torch = Wide()  # type: ignore[attr-defined]

BLT: dict[str, Any] = {
    "vocab_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 48, 192),
    "num_key_value_heads": (2, 1, 6),
    "tie_word_embeddings": (False, True),
}

LONGCAT: dict[str, Any] = {
    **without(without(LATENT, "num_hidden_layers"), "intermediate_size"),
    "num_layers": 2,
    "ffn_hidden_size": 112,
    "expert_ffn_hidden_size": 56,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "head_dim": 8,
    "qk_head_dim": 32,
    "attention_bias": True,
}

INKLING: dict[str, Any] = {
    **COMMON,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window_size": 8,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 3,
    "swa_head_dim": 16,
    "d_rel": 4,
    "rel_extent": 8,
    "moe_intermediate_size": 56,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
}

ZAMBA2: dict[str, Any] = {
    **without(DERIVED, "head_dim"),
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "hybrid_layer_ids": [1, 2],
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "n_mamba_heads": 4,
    "mamba_headdim": 48,
    "adapter_rank": 8,
    "use_mem_rope": True,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}

FAMILIES: dict[str, Family] = {
    "openai-gpt": Family(
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        without(without(GPT, "n_inner"), "tie_word_embeddings"),
        {"n_embd": (96, 48), **TIED},
        1e-12,
    ),
    "doge": Family(
        "doge",
        "DogeForCausalLM",
        {**DERIVED, "attention_bias": True, "mlp_bias": True, "keep_window_size": 8},
        SIZES,
    ),
    "dory": Family(
        "dory",
        "DoryForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 8,
            "n_input_layers": 1,
            "n_recurrent_layers": 1,
            "initializer_range": 0.5,  # everything learned is multiplied by its inverse
            "n_output_layers": 1,
        },
        SIZES,
    ),
    "longcat_flash": Family("longcat_flash", "LongcatFlashForCausalLM", LONGCAT),
    "zamba": Family(
        "zamba",
        "ZambaForCausalLM",
        {
            **without(DERIVED, "head_dim"),
            "num_hidden_layers": 3,
            "num_key_value_heads": 6,
            "attention_hidden_size": 192,
            "attention_head_dim": 32,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_dt_rank": 6,
            "n_mamba_heads": 2,
            "use_mamba_kernels": False,
        },
        {"intermediate_size": (112, 56)},
        1e-5,
    ),
    "hy_v4": Family(
        "hy_v4",
        "HYV4ForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "index_topk": 5,
            "index_head_dim": 12,
            "index_n_heads": 4,
            "mlp_layer_types": ["dense", "sparse"],
        },
        {"hidden_size": (96, 48)},
    ),
    "zaya": Family(
        "zaya",
        "ZayaForCausalLM",
        {
            **COMMON,
            "moe_intermediate_size": 56,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "layer_types": ["hybrid", "hybrid"],
            "router_hidden_size": 24,
            "attention_bias": True,
        },
        {"hidden_size": (96, 48)},
    ),
    "inkling_text": Family(
        "inkling_text", "InklingForCausalLM", INKLING, {"hidden_size": (96, 48)}
    ),
    "ctrl": Family(
        "ctrl",
        "CTRLLMHeadModel",
        {
            "vocab_size": 64,
            "n_positions": 256,
            "n_embd": 96,
            "dff": 112,
            "n_layer": 2,
            "n_head": 6,
            "tie_word_embeddings": False,
        },
        {"n_embd": (96, 48), **TIED},
        1e-12,
    ),
    "xglm": Family(
        "xglm",
        "XGLMForCausalLM",
        {
            "vocab_size": 64,
            "d_model": 96,
            "ffn_dim": 112,
            "num_layers": 2,
            "attention_heads": 6,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
        {"d_model": (96, 48), **TIED},
    ),
    "rwkv": Family(
        "rwkv",
        "RwkvForCausalLM",
        {
            "vocab_size": 64,
            "context_length": 256,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "intermediate_size": 112,
            "rescale_every": 0,  # else a forward halves weights, and saving keeps that
            "tie_word_embeddings": False,
        },
        {"hidden_size": (96, 48), "intermediate_size": (112, 56)},
    ),
    "axk2": Family(
        "axk2",
        "AXK2ForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "index_topk": 5,
            "index_head_dim": 12,
            "index_n_heads": 4,
            "gated_norm_rank": 8,
            "mlp_layer_types": ["dense", "sparse"],
        },
        {"hidden_size": (96, 48)},
    ),
    "deepseek_v4": Family(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        {
            **without(COMMON, "intermediate_size"),
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 36,
            "o_groups": 2,
            "o_lora_rank": 20,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "sliding_window": 8,
            "hc_mult": 2,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "rope_parameters": {
                name: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
                for name in ("main", "compress")
            },
        },
        {"hidden_size": (96, 48)},
    ),
    "zamba2": Family("zamba2", "Zamba2ForCausalLM", ZAMBA2, {"intermediate_size": (112, 56)}, 1e-5),
    "zamba2_adapted": Family(
        "zamba2",
        "Zamba2ForCausalLM",
        {**ZAMBA2, "use_shared_attention_adapter": True},
        {"intermediate_size": (112, 56)},
        1e-5,
    ),
    "blt": Family(
        "blt",
        "BltForCausalLM",
        {
            "vocab_size": 64,
            "num_hidden_layers": 2,  # it asks itself for this where it makes its cache
            "cross_attn_k": 2,
            "encoder_hash_byte_group_size": [2, 3],
            "encoder_hash_byte_group_vocab": 40,
            "local_attention_window_len": 8,
            "patching_threshold": 3.68,  # so that patches differ in length
            "max_patch_length": 4,
            "patcher_config": {**BLT, "hidden_size": 48},
            "encoder_config": {**BLT, "hidden_size": 96},
            "decoder_config": {**BLT, "hidden_size": 96, "hidden_size_global": 192},
            "global_config": {**without(BLT, "vocab_size"), "hidden_size": 192},
            "pad_token_id": 0,
        },
        {"local_attention_window_len": (8, None)},
        1e-5,
    ),
}
