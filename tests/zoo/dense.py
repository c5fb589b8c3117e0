"""Decoders with RMSNorm and one MLP a layer."""

from typing import Any

from zoo import Family

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
    # Some configurations insist on a multiple of the heads, whatever head_dim is.
    "hidden_size": (96, 48, 192),
    "intermediate_size": (112, 56, 144),
    "num_key_value_heads": (2, 1, 6, 3),
    "head_dim": (16, 8, 24),
    "tie_word_embeddings": (False, True),
    "num_hidden_layers": (2, 1, 3),
}

DERIVED: dict[str, Any] = {key: value for key, value in COMMON.items() if key != "head_dim"}
"""For models that take head_dim from the hidden size."""

DERIVED_SIZES: dict[str, tuple[Any, ...]] = {
    key: values for key, values in SIZES.items() if key != "head_dim"
}

BIASES = {"attention_bias": (True, False)}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
WITHOUT_LAYERS = {key: values for key, values in SIZES.items() if key != "num_hidden_layers"}

GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "intermediate_size": 112,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 24,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}

KEYS_AS_VALUES = {"attention_k_eq_v": (False, True)}

UNIFIED = {key: value for key, value in GEMMA4.items() if not key.endswith("per_layer_input")}


def _family(model_type: str, model_class: str, changes: Any = None, more: Any = None) -> Family:
    return Family(
        model_type, f"{model_class}ForCausalLM", COMMON | (changes or {}), SIZES | (more or {})
    )


def _derived(model_type: str, model_class: str, changes: Any = None, more: Any = None) -> Family:
    return Family(
        model_type,
        f"{model_class}ForCausalLM",
        DERIVED | (changes or {}),
        DERIVED_SIZES | (more or {}),
    )


def _layered(model_type: str, model_class: str, changes: Any, more: Any = None) -> Family:
    """Layers of two kinds: their number stays."""
    return Family(
        model_type,
        f"{model_class}ForCausalLM",
        COMMON | changes,
        WITHOUT_LAYERS | (more or {}),
    )


FAMILIES: dict[str, Family] = {
    "llama": _family(
        "llama",
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        BIASES | {"mlp_bias": (True, False)},
    ),
    "mistral": _family("mistral", "Mistral", {"sliding_window": 8}),
    "ministral": _layered("ministral", "Ministral", SLIDING),
    "ministral3": _family("ministral3", "Ministral3"),
    "smollm3": _derived(
        "smollm3",
        "SmolLM3",
        {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0]},
        BIASES | {"num_hidden_layers": (2,)},
    ),
    "ernie4_5": _family("ernie4_5", "Ernie4_5", {"use_bias": True}, {"use_bias": (True, False)}),
    "qwen2": _layered("qwen2", "Qwen2", SLIDING | {"use_sliding_window": True}),
    "qwen3": _family("qwen3", "Qwen3", {"attention_bias": True}, BIASES),
    "hunyuan_v1_dense": _family("hunyuan_v1_dense", "HunYuanDenseV1", {"attention_bias": True}),
    "granite": _derived(
        "granite",
        "Granite",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        BIASES,
    ),
    "seed_oss": _family(
        "seed_oss",
        "SeedOss",
        {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        BIASES,
    ),
    "helium": _family("helium", "Helium", {"attention_bias": True, "mlp_bias": True}),
    "cwm": _layered("cwm", "Cwm", SLIDING),
    "exaone": _family("exaone", "Llama"),
    "iquestcoder": _family("iquestcoder", "Llama", {"attention_bias": True}, BIASES),
    "diffllama": _family(
        "diffllama",
        "DiffLlama",
        {"attention_bias": True, "num_key_value_heads": 6},
        {"num_key_value_heads": (6, 2)},
    ),
    "granite_swa": _layered(
        "granite_swa",
        "GraniteSWA",
        SLIDING | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "hyperclovax": _family(
        "hyperclovax", "HyperCLOVAX", {"attention_multiplier": 0.1, "residual_multiplier": 0.5}
    ),
    "hyperclovax_plain": _family("hyperclovax", "HyperCLOVAX", {"use_post_norm": False}),
    "phi3": _derived("phi3", "Phi3", {}, {"partial_rotary_factor": (1.0, 0.5)}),
    "glm": _family("glm", "Glm", {"attention_bias": True}, BIASES),
    "glm4": _family("glm4", "Glm4", {"attention_bias": True}, BIASES),
    "gemma": _family("gemma", "Gemma", {"tie_word_embeddings": True, "attention_bias": True}),
    "vaultgemma": _layered("vaultgemma", "VaultGemma", SLIDING),
    "gemma2": _layered("gemma2", "Gemma2", SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3_text": _layered("gemma3_text", "Gemma3", SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma3n_text": _layered("gemma3n_text", "Gemma3n", GEMMA3N),
    "gemma3n_shared": _layered("gemma3n_text", "Gemma3n", GEMMA3N | {"num_kv_shared_layers": 2}),
    "gemma4_text": _layered("gemma4_text", "Gemma4", GEMMA4, KEYS_AS_VALUES),
    "gemma4_shared": _layered(
        "gemma4_text",
        "Gemma4",
        GEMMA4 | {"num_kv_shared_layers": 2, "attention_k_eq_v": False},
        KEYS_AS_VALUES,
    ),
    "gemma4_experts": _layered(
        "gemma4_text",
        "Gemma4",
        GEMMA4
        | {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 56,
        },
    ),
    "gemma4_unified_text": _layered("gemma4_unified_text", "Gemma4Unified", UNIFIED),
    "gemma4_unified_shared": _layered(
        "gemma4_unified_text",
        "Gemma4Unified",
        UNIFIED | {"num_kv_shared_layers": 2},
        KEYS_AS_VALUES,
    ),
    "internlm3": _family(
        "internlm3", "Llama", {"qkv_bias": True, "bias": True}, {"qkv_bias": (True, False)}
    ),
    "olmo2": _derived("olmo2", "Olmo2", {"attention_bias": True}, BIASES),
    "olmo3": Family(
        "olmo3",
        "Olmo3ForCausalLM",
        DERIVED | SLIDING,
        {key: v for key, v in DERIVED_SIZES.items() if key != "num_hidden_layers"},
    ),
    "exaone4": _layered("exaone4", "Exaone4", SLIDING),
    "bitnet": _derived("bitnet", "BitNet", {"attention_bias": True}, BIASES),
    "arcee": _family("arcee", "Arcee", {"attention_bias": True, "mlp_bias": True}, BIASES),
    "apertus": _derived("apertus", "Apertus", {"attention_bias": True}, BIASES),
    "apertus1p5_text": _derived(
        "apertus1p5_text",
        "Apertus1p5Text",
        {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        BIASES,
    ),
    "nanochat": _derived("nanochat", "NanoChat", {"attention_bias": True}, BIASES),
}
