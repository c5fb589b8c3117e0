"""Decoders with state-space, linear-attention and convolution layers among or instead of attention.

The sequences of the tests are longer than a convolution and than a chunk of the scans.
"""

from typing import Any

from zoo import Family
from zoo.experts import GROUPED, LATENT, without

SCANS = 1e-5
"""The limit for models whose scans work in float32 beyond their norms: without any rotation they
differ from themselves in float64 by up to 4e-6, others by 2e-7."""

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 80, 48, 160),
    "num_key_value_heads": (2, 1, 6, 3),
    "head_dim": (16, 8, 24),
    "intermediate_size": (112, 56, 40),
    "tie_word_embeddings": (False, True),
}

EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 56,
    "shared_expert_intermediate_size": 80,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

EXPERTS_SIZES: dict[str, tuple[Any, ...]] = {
    "moe_intermediate_size": (56, 40),
    "shared_expert_intermediate_size": (80, 56),
    "num_experts_per_tok": (2, 1, 3),
}

DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "attention_bias": True,
}
"""Gated delta rule beside gated attention."""

DELTA_SIZES: dict[str, tuple[Any, ...]] = {
    "linear_value_head_dim": (12, 8, 20),
    "linear_num_value_heads": (4, 2),
    "attention_bias": (True, False),
    "layer_types": (
        ["linear_attention", "full_attention"],
        ["full_attention", "linear_attention"],
        ["linear_attention", "linear_attention"],
    ),
}

SCAN: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_proj_bias": True,
    "attention_bias": True,
}
"""Mamba 2 layers, as Bamba and its relatives name their sizes."""

SCAN_SIZES: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (2, 1, 6, 3),
    "tie_word_embeddings": (False, True),
    "mamba_n_groups": (2, 1, 3),
    "mamba_d_state": (10, 16),
    "mamba_conv_bias": (True, False),
    "mamba_proj_bias": (True, False),
    "attention_bias": (True, False),
}

NEMOTRON: dict[str, Any] = {
    **{key: value for key, value in COMMON.items() if key != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "mlp_bias": True,
    "use_bias": True,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 10,
    "n_groups": 2,
    "chunk_size": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 56,
    "moe_shared_expert_intermediate_size": 80,
}

LFM3: dict[str, Any] = {
    **COMMON,
    "layer_types": ["conv", "full_attention"],
    "conv_bias": True,
    "attention_bias": True,
}

FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **COMMON,
            **EXPERTS,
            **DELTA,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_only_layers": [2],
        },
        {
            **SIZES,
            **EXPERTS_SIZES,
            "linear_value_head_dim": (12, 8, 20),
            "linear_num_value_heads": (4, 2),
            "attention_bias": (True, False),
            "mlp_only_layers": ([2], [], [0, 1]),
            "decoder_sparse_step": (1, 2),
            "norm_topk_prob": (True, False),
        },
        exact=SCANS,
    ),
    "qwen3_5_text": Family(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        {**COMMON, **DELTA, "head_dim": 32},
        {**SIZES, **DELTA_SIZES, "head_dim": (32, 64)},
        exact=SCANS,
    ),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {**COMMON, **EXPERTS, **DELTA, "head_dim": 32},
        {**SIZES, **EXPERTS_SIZES, **DELTA_SIZES, "head_dim": (32, 64)},
        exact=SCANS,
    ),
    "mamba2": Family(
        "mamba2",
        "Mamba2ForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_heads": 6,
            "head_dim": 32,
            "state_size": 10,
            "n_groups": 2,
            "chunk_size": 8,
            "use_bias": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
        {
            "state_size": (10, 16),
            "n_groups": (2, 1, 3),
            "use_bias": (True, False),
            "use_conv_bias": (True, False),
            "residual_in_fp32": (True, False),
            "tie_word_embeddings": (False, True),
        },
    ),
    "mamba": Family(
        "mamba",
        "MambaForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "state_size": 10,
            "use_bias": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            "hidden_size": (96, 80, 48),
            "state_size": (10, 16),
            "expand": (2, 1),
            "use_bias": (True, False),
            "use_conv_bias": (True, False),
            "residual_in_fp32": (True, False),
            "tie_word_embeddings": (True, False),
        },
    ),
    "falcon_mamba": Family(
        "falcon_mamba",
        "FalconMambaForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "state_size": 10,
            "use_bias": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
        {
            "hidden_size": (96, 80, 48),
            "use_bias": (True, False),
            "tie_word_embeddings": (False, True),
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        NEMOTRON,
        {
            **SIZES,
            "mlp_bias": (True, False),
            "use_bias": (True, False),
            "use_conv_bias": (True, False),
            "n_groups": (2, 1),
            "moe_intermediate_size": (56, 40),
            "moe_latent_size": (None, 48, 96),
            "num_experts_per_tok": (2, 1, 3),
        },
    ),
    "nemotron_h_latent": Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {**NEMOTRON, "moe_latent_size": 48},
        {**SIZES, "moe_latent_size": (48, 96), "mlp_bias": (True, False)},
    ),
    "falcon_h1": Family(
        "falcon_h1",
        "FalconH1ForCausalLM",
        {
            **COMMON,
            **SCAN,
            "mamba_d_ssm": 192,
            "mamba_rms_norm": True,
            "mlp_bias": True,
            "projectors_bias": True,
            "embedding_multiplier": 5.0,
            "lm_head_multiplier": 0.6,
            "key_multiplier": 0.4,
            "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 0.7,
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.9,
            "mlp_multipliers": [0.9, 0.8],
            "ssm_multipliers": [0.4, 0.3, 0.2, 0.5, 0.4],
        },
        {
            **SCAN_SIZES,
            "intermediate_size": (112, 56),
            "mamba_rms_norm": (True, False),
            "mamba_norm_before_gate": (True, False),
            "mlp_bias": (True, False),
            "projectors_bias": (True, False),
        },
    ),
    "bamba": Family(
        "bamba",
        "BambaForCausalLM",
        {**COMMON, **SCAN, "attn_layer_indices": [1], "mlp_bias": True},
        {
            **SCAN_SIZES,
            "intermediate_size": (112, 56),
            "attn_layer_indices": ([1], [0]),
            "mlp_bias": (True, False),
        },
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **COMMON,
            **SCAN,
            "intermediate_size": 56,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 80,
            "layer_types": ["linear_attention", "full_attention"],
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
        {
            **SCAN_SIZES,
            "tie_word_embeddings": (True, False),
            "num_local_experts": (4, 0),
            "position_embedding_type": ("rope", "nope", None),
            "shared_intermediate_size": (80, 40),
        },
    ),
    "lfm2": Family(
        "lfm2",
        "Lfm2ForCausalLM",
        {
            **COMMON,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
            "conv_bias": True,
        },
        {
            **SIZES,
            "block_auto_adjust_ff_dim": (False, True),
            "block_multiple_of": (8, 40),
            "conv_bias": (True, False),
        },
    ),
    "bailing_hybrid": Family(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        {
            **without(LATENT, "num_experts_per_tok"),
            **without(GROUPED, "n_routed_experts"),
            "num_hidden_layers": 3,
            "q_lora_rank": 24,
            "num_experts": 4,
            "num_shared_experts": 1,
            "num_experts_per_token": 2,
            "num_expert_group": 1,
            "linear_head_dim": 12,
            "linear_num_heads": 6,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        {"hidden_size": (96, 48), "linear_head_dim": (12, 16)},
        exact=SCANS,
    ),
    "lfm3": Family("lfm3", "Lfm3ForCausalLM", LFM3, SIZES),
    "lfm3_plain": Family("lfm3", "Lfm3ForCausalLM", {**LFM3, "use_sandwich_norm": False}, SIZES),
    "lara_mini": Family(
        "lara_mini",
        "LaraMiniForCausalLM",
        {**COMMON, **EXPERTS, **DELTA, "layer_types": ["linear_attention", "sliding_attention"]},
        {**SIZES, **EXPERTS_SIZES},
        exact=SCANS,
    ),
    "lfm2_moe": Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 56,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_bias": True,
        },
        {
            **SIZES,
            "moe_intermediate_size": (56, 40),
            "num_dense_layers": (1, 0, 3),
            "use_expert_bias": (True, False),
            "norm_topk_prob": (True, False),
            "conv_bias": (True, False),
        },
    ),
    "jamba": Family(
        "jamba",
        "JambaForCausalLM",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 10,
            "mamba_proj_bias": True,
        },
        {
            "hidden_size": (96, 48, 192),
            "num_key_value_heads": (2, 1, 6, 3),
            "intermediate_size": (112, 56),
            "expert_layer_period": (2, 3),
            "mamba_proj_bias": (True, False),
            "tie_word_embeddings": (False, True),
        },
        exact=SCANS,
    ),
    "olmo_hybrid": Family(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        {
            **COMMON,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "attention_bias": True,
        },
        {
            "hidden_size": (96, 48, 192),
            "num_key_value_heads": (2, 1, 6, 3),
            "intermediate_size": (112, 56),
            "attention_bias": (True, False),
            "tie_word_embeddings": (False, True),
        },
    ),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {
            **{key: value for key, value in COMMON.items() if key != "head_dim"},
            "intermediate_size": 224,
            "lru_width": 72,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "hidden_size": (96, 48, 192),
            "num_key_value_heads": (2, 1, 6, 3),
            "intermediate_size": (224, 112),
            "attention_bias": (True, False),
            "tie_word_embeddings": (True, False),
        },
    ),
    "kimi_linear": Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        {
            **{key: value for key, value in COMMON.items() if key != "head_dim"},
            "num_hidden_layers": 3,
            "num_key_value_heads": 6,
            "q_lora_rank": 36,
            "kv_lora_rank": 28,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 20,
            "moe_intermediate_size": 56,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "linear_head_dim": 12,
            "linear_num_heads": 4,
            "attention_bias": True,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        {
            "hidden_size": (96, 48, 192),
            "q_lora_rank": (36, None),
            "attention_bias": (True, False),
            "tie_word_embeddings": (False, True),
            "n_shared_experts": (2, 1),
            "linear_head_dim": (12, 16),
        },
        exact=SCANS,
    ),
}
