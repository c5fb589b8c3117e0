"""Mixtures of experts.

Routers see few experts, and several a token, so that every expert is used. Sizes differ wherever
two could be mixed up: stream 96, dense MLP 112, experts 56, shared experts 80 or 112.
"""

from typing import Any

from zoo import Family


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings but one."""
    return {key: value for key, value in settings.items() if key != name}


COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 80, 48, 160),
    "num_key_value_heads": (2, 1, 6, 3),
    "head_dim": (16, 8, 24),
    "tie_word_embeddings": (False, True),
    "num_experts_per_tok": (2, 1, 3),
}

DERIVED: dict[str, Any] = without(COMMON, "head_dim")
"""For models that take head_dim from the hidden size."""

DERIVED_SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 48, 192),
    "num_key_value_heads": (2, 1, 6, 3),
    "tie_word_embeddings": (False, True),
    "num_experts_per_tok": (2, 1, 3),
}

LATENT: dict[str, Any] = {
    **without(COMMON, "head_dim"),
    "num_key_value_heads": 6,
    "q_lora_rank": 36,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
"""Multi-head latent attention; all of its sizes differ."""

LATENT_SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 48, 192),
    "q_lora_rank": (36, None),
    # The latent as wide as a key: what goes into the cache then looks like keys.
    "kv_lora_rank": (28, 32),
    "v_head_dim": (20, 16, 8),
    "attention_bias": (True, False),
    "tie_word_embeddings": (False, True),
    "num_experts_per_tok": (2, 1, 3),
}

INDEXER: dict[str, Any] = {
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "attention_bias": True,
    "index_topk": 5,
    "index_head_dim": 12,
    "index_n_heads": 4,
}
"""Attention to the keys that an indexer chooses."""

SPARSE_SIZES: dict[str, tuple[Any, ...]] = {
    **without(LATENT_SIZES, "q_lora_rank"),
    "index_topk": (5, 8, 64),
}

GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 56,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
"""Experts as DeepSeek names them."""

GROUPED_SIZES: dict[str, tuple[Any, ...]] = {
    "moe_intermediate_size": (56, 40, 24),
    "n_shared_experts": (2, 1),
    "n_group": (1, 2),
    "norm_topk_prob": (True, False),
}


def _yarn(**more: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        **more,
    }


SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}

QWEN: dict[str, Any] = {"moe_intermediate_size": 56, "num_experts": 4}
"""Experts as Qwen names them."""

SHARED: dict[str, Any] = {**QWEN, "shared_expert_intermediate_size": 80}

LAGUNA: dict[str, Any] = {
    **COMMON,
    **SHARED,
    **SLIDING,
    "num_attention_heads_per_layer": [6, 12],
    "mlp_layer_types": ["dense", "sparse"],
    "attention_bias": True,
}


def _laguna(gating: Any) -> Family:
    return Family("laguna", "LagunaForCausalLM", {**LAGUNA, "gating": gating}, SIZES)


FAMILIES: dict[str, Family] = {
    "mellum": Family(
        "mellum", "MellumForCausalLM", {**COMMON, **SLIDING, **QWEN, "attention_bias": True}, SIZES
    ),
    "flint": Family(
        "flint", "FlintForCausalLM", {**COMMON, **SLIDING, **SHARED, "mlp_only_layers": [0]}, SIZES
    ),
    "kolibri1": Family("kolibri1", "Kolibri1ForCausalLM", {**COMMON, **SLIDING, **SHARED}, SIZES),
    "beam": Family(
        "beam",
        "BeamForCausalLM",
        {
            **COMMON,
            **QWEN,
            **SLIDING,
            "mlp_layer_types": ["dense", "sparse"],
            "n_group": 2,
            "topk_group": 1,
            "attention_bias": True,
        },
        SIZES,
    ),
    "mimo_v2_flash": Family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            **COMMON,
            **without(GROUPED, "n_shared_experts"),
            **SLIDING,
            "mlp_layer_types": ["dense", "sparse"],
            # Sliding layers have twice as many key heads.
            "num_attention_heads": 8,
            "v_head_dim": 12,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
                for kind in SLIDING["layer_types"]
            },
        },
        {**without(SIZES, "head_dim"), "v_head_dim": (12, 8), "num_key_value_heads": (2, 1)},
    ),
    "axk1": Family(
        "axk1",
        "AXK1ForCausalLM",
        {**LATENT, **GROUPED, "mlp_layer_types": ["dense", "sparse"], "attention_bias": True},
        {**without(LATENT_SIZES, "q_lora_rank"), **GROUPED_SIZES},
    ),
    "minimax_m3_vl_text": Family(
        "minimax_m3_vl_text",
        "MiniMaxM3VLForCausalLM",
        {
            **COMMON,
            "intermediate_size": 56,
            "dense_intermediate_size": 112,
            "shared_intermediate_size": 80,
            "num_local_experts": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "rotary_dim": 8,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 2,
            "index_topk_blocks": 2,
        },
        {"hidden_size": (96, 48), "num_experts_per_tok": (2, 1)},
    ),
    "laguna": _laguna(True),
    "laguna_heads": _laguna("per-head"),
    "laguna_elements": _laguna("per-element"),
    "sarvam_moe": Family(
        "sarvam_moe",
        "Glm4MoeForCausalLM",
        {**COMMON, **GROUPED, "first_k_dense_replace": 1},
        {**SIZES, **GROUPED_SIZES},
    ),
    "sarvam_mla": Family(
        "sarvam_mla",
        "DeepseekV3ForCausalLM",
        {**LATENT, **GROUPED, "first_k_dense_replace": 1},
        {**LATENT_SIZES, **GROUPED_SIZES},
    ),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        {**COMMON, "num_local_experts": 4, "sliding_window": 8},
        {**SIZES, "intermediate_size": (112, 56, 40), "sliding_window": (8, None)},
    ),
    "olmoe": Family(
        "olmoe",
        "OlmoeForCausalLM",
        {**DERIVED, "intermediate_size": 56, "num_experts": 4, "attention_bias": True},
        {
            **DERIVED_SIZES,
            "intermediate_size": (56, 40),
            "attention_bias": (True, False),
            "clip_qkv": (None, 0.5),
            "norm_topk_prob": (False, True),
        },
    ),
    "olmoe_clipped": Family(
        "olmoe",
        "OlmoeForCausalLM",
        {**DERIVED, "intermediate_size": 56, "num_experts": 4, "clip_qkv": 0.5},
        {**DERIVED_SIZES, "clip_qkv": (0.5, 0.1)},
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "num_experts": 4,
            "num_local_experts": 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
        {
            **SIZES,
            "moe_intermediate_size": (56, 40),
            "decoder_sparse_step": (1, 2),
            "mlp_only_layers": ([1], [], [0, 2]),
            "attention_bias": (True, False),
            "norm_topk_prob": (False, True),
        },
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "shared_expert_intermediate_size": 80,
            "num_experts": 4,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        {
            **SIZES,
            "moe_intermediate_size": (56, 40),
            "shared_expert_intermediate_size": (80, 56),
            "decoder_sparse_step": (2, 1),
            "mlp_only_layers": (None, [1]),
            "qkv_bias": (True, False),
            "use_sliding_window": (True, False),
        },
    ),
    "glm4_moe": Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **COMMON,
            **GROUPED,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        {
            **SIZES,
            **GROUPED_SIZES,
            "attention_bias": (True, False),
            "use_qk_norm": (True, False),
            "first_k_dense_replace": (1, 0, 3),
        },
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": _yarn(),
        },
        {
            **LATENT_SIZES,
            **GROUPED_SIZES,
            "n_group": (2, 1),
            "rope_interleave": (True, False),
            "first_k_dense_replace": (1, 0, 3),
        },
    ),
    "deepseek_v3_full_queries": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "first_k_dense_replace": 1,
        },
        {**LATENT_SIZES, **GROUPED_SIZES, "q_lora_rank": (None,), "kv_lora_rank": (32, 28)},
    ),
    "youtu": Family("youtu", "YoutuForCausalLM", {**LATENT, "attention_bias": True}, LATENT_SIZES),
    "minicpm3": Family(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {**LATENT, "attention_bias": True, "mlp_bias": True, "dim_model_base": 48},
        LATENT_SIZES,
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
        },
        {
            **LATENT_SIZES,
            **GROUPED_SIZES,
            "n_group": (2, 1),
            "mlp_bias": (True, False),
            "topk_method": ("group_limited_greedy", "greedy"),
        },
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **COMMON,
            "intermediate_size": 56,
            "num_local_experts": 4,
            "sliding_window": 8,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            **SIZES,
            "intermediate_size": (56, 40, 96),
            "attention_bias": (True, False),
            "num_local_experts": (4, 3),
        },
    ),
    "llama4_text": Family(
        "llama4_text",
        "Llama4ForCausalLM",
        {
            **COMMON,
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
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            **SIZES,
            "num_experts_per_tok": (1, 2),
            "intermediate_size": (56, 40),
            "interleave_moe_layer_step": (2, 1),
            "use_qk_norm": (True, False),
            "attn_temperature_tuning": (True, False),
            "attention_bias": (True, False),
            "moe_layers": (None, []),
        },
    ),
    "phimoe": Family(
        "phimoe",
        "PhimoeForCausalLM",
        {
            **DERIVED,
            "intermediate_size": 56,
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {
            **DERIVED_SIZES,
            "num_experts_per_tok": (2,),
            "intermediate_size": (56, 40),
            "attention_bias": (True, False),
            "lm_head_bias": (True, False),
        },
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {
            **without(DERIVED, "num_experts_per_tok"),
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "use_bias": True,
        },
        {
            **DERIVED_SIZES,
            "num_experts_per_tok": (2, 1),
            "moe_intermediate_size": (56, 40),
            "moe_num_shared_experts": (2, 0, 1),
            "moe_layer_interval": (1, 2),
            "use_bias": (True, False),
        },
    ),
    "dots1": Family(
        "dots1",
        "Dots1ForCausalLM",
        {
            **COMMON,
            **GROUPED,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        {**SIZES, **GROUPED_SIZES, "attention_bias": (True, False)},
    ),
    "hunyuan_v1_moe": Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        {
            **without(COMMON, "num_experts_per_tok"),
            "num_experts": 4,
            "moe_topk": 2,
            "attention_bias": True,
        },
        {
            **without(SIZES, "num_experts_per_tok"),
            "intermediate_size": (112, 56),
            "moe_topk": (2, 1, [1, 3]),
            "attention_bias": (True, False),
        },
    ),
    "granitemoe": Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            **DERIVED,
            "num_local_experts": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
        {**DERIVED_SIZES, "tie_word_embeddings": (True, False), "attention_bias": (True, False)},
    ),
    "granitemoeshared": Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        {
            **DERIVED,
            "num_local_experts": 4,
            "shared_intermediate_size": 80,
            "attention_bias": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
        {
            **DERIVED_SIZES,
            "shared_intermediate_size": (80, 0, 56),
            "attention_bias": (True, False),
        },
    ),
    "minimax": Family(
        "minimax",
        "MiniMaxForCausalLM",
        {
            **COMMON,
            "num_local_experts": 4,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "full_attn_alpha_factor": 2.5,
            "linear_attn_beta_factor": 0.7,
            "mlp_alpha_factor": 1.5,
        },
        {**SIZES, "intermediate_size": (112, 56), "sliding_window": (None, 8)},
    ),
    "minimax_m2": Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {**COMMON, "intermediate_size": 56, "num_local_experts": 4},
        {**SIZES, "intermediate_size": (56, 40)},
    ),
    "flex_olmo": Family(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        {**DERIVED, "intermediate_size": 56, "num_experts": 4, "attention_bias": True},
        {**DERIVED_SIZES, "intermediate_size": (56, 40), "attention_bias": (True, False)},
    ),
    "mistral4": Family(
        "mistral4",
        "Mistral4ForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "rope_parameters": _yarn(llama_4_scaling_beta=0.1),
        },
        {**LATENT_SIZES, **GROUPED_SIZES, "first_k_dense_replace": (1, 0)},
    ),
    "glm4_moe_lite": Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {
            **LATENT,
            **GROUPED,
            "mlp_layer_types": ["dense", "sparse"],
            "attention_bias": True,
        },
        {**LATENT_SIZES, **GROUPED_SIZES},
    ),
    "solar_open": Family(
        "solar_open",
        "SolarOpenForCausalLM",
        {**COMMON, **GROUPED, "attention_bias": True},
        {**SIZES, **GROUPED_SIZES, "attention_bias": (True, False)},
    ),
    "afmoe": Family(
        "afmoe",
        "AfmoeForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "moe_intermediate_size": 56,
            "num_experts": 4,
            "num_shared_experts": 2,
            "attention_bias": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mup_enabled": True,
            "route_scale": 1.5,
        },
        {
            **SIZES,
            "moe_intermediate_size": (56, 40),
            "num_shared_experts": (2, 1),
            "attention_bias": (True, False),
            "mup_enabled": (True, False),
        },
    ),
    "exaone_moe": Family(
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "num_experts": 4,
            "num_shared_experts": 2,
            "first_k_dense_replace": 1,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
        },
        {
            **SIZES,
            "moe_intermediate_size": (56, 40),
            "num_shared_experts": (2, 1),
            "first_k_dense_replace": (1, 0),
        },
    ),
    "hy_v3": Family(
        "hy_v3",
        "HYV3ForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "num_experts": 4,
            "num_shared_experts": 2,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {
            **SIZES,
            "moe_intermediate_size": (56, 40),
            "num_shared_experts": (2, 1),
            "attention_bias": (True, False),
            "mlp_bias": (True, False),
            "enable_moe_fp32_combine": (True, False),
        },
    ),
    "granitemoe_swa": Family(
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        {
            **DERIVED,
            "num_local_experts": 4,
            "shared_intermediate_size": 80,
            "attention_bias": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "layer_rope_theta": [10000.0, 0.0],
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
        {
            **DERIVED_SIZES,
            "shared_intermediate_size": (80, 0, 56),
            "attention_bias": (True, False),
        },
    ),
    "deepseek_v32": Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        {**LATENT, **GROUPED, **INDEXER},
        {**SPARSE_SIZES, **GROUPED_SIZES},
    ),
    "glm_moe_dsa": Family(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        {**LATENT, **GROUPED, **INDEXER, "indexer_types": ["full", "shared", "full"]},
        {**SPARSE_SIZES, **GROUPED_SIZES},
    ),
    "cohere2_moe": Family(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "intermediate_size": 56,
            "prefix_dense_intermediate_size": 80,
            "num_experts": 4,
            "num_shared_experts": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "logit_scale": 0.5,
        },
        {
            **SIZES,
            "tie_word_embeddings": (True, False),
            "intermediate_size": (56, 40),
            "num_shared_experts": (2, 0),
            "shared_expert_combination_strategy": ("average", "sum"),
            "rms_norm_eps": (None, 1e-6),
            "attention_bias": (True, False),
        },
    ),
    "cohere2_moe_rms": Family(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        {
            **COMMON,
            "intermediate_size": 56,
            "prefix_dense_intermediate_size": 80,
            "num_experts": 4,
            "num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
            "rms_norm_eps": 1e-6,
            "expert_selection_fn": "sigmoid",
        },
        {**SIZES, "intermediate_size": (56, 40), "expert_selection_fn": ("sigmoid", "softmax")},
    ),
}
