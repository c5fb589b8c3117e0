"""Decoders whose residual stream no rotation can pass."""

from typing import Any

from zoo import Family
from zoo.dense import COMMON, DERIVED
from zoo.experts import GROUPED, LATENT, without
from zoo.layernorm import GPT, TIED

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
}
