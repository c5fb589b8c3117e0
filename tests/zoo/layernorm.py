"""Decoders with LayerNorm."""

from typing import Any

from zoo import Family
from zoo.dense import COMMON, DERIVED, DERIVED_SIZES, SIZES

EXACT = 1e-12
LAYERS = {"num_hidden_layers": (2, 1, 3)}
TIED = {"tie_word_embeddings": (False, True)}
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNTIED = {**TOKENS, "tie_word_embeddings": False}

GPT: dict[str, Any] = {
    **UNTIED,
    "n_embd": 96,
    "n_layer": 2,
    "n_head": 6,
    "n_inner": 112,
    "n_positions": 256,
}
GPT_SIZES: dict[str, tuple[Any, ...]] = {
    "n_embd": (96, 48, 192),
    "n_head": (6, 3),
    "n_inner": (112, 56, None),
    **TIED,
}

FALCON: dict[str, Any] = {
    **UNTIED,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "ffn_hidden_size": 112,
    "bias": True,
}
FALCON_SIZES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (96, 48, 192),
    "ffn_hidden_size": (112, 56),
    "bias": (True, False),
    "alibi": (False, True),
    **TIED,
}

FAMILIES: dict[str, Family] = {
    "olmo": Family(
        "olmo",
        "OlmoForCausalLM",
        DERIVED | {"attention_bias": True},
        DERIVED_SIZES | {"clip_qkv": (None, 0.5)},
    ),
    "olmo_clipped": Family("olmo", "OlmoForCausalLM", DERIVED | {"clip_qkv": 0.5}, DERIVED_SIZES),
    "cohere": Family(
        "cohere",
        "CohereForCausalLM",
        DERIVED | {"attention_bias": True, "use_qk_norm": True, "logit_scale": 0.5},
        DERIVED_SIZES | {"use_qk_norm": (True, False)},
    ),
    "cohere2": Family(
        "cohere2",
        "Cohere2ForCausalLM",
        COMMON
        | {
            "attention_bias": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {key: values for key, values in SIZES.items() if key != "num_hidden_layers"},
    ),
    "stablelm": Family(
        "stablelm",
        "StableLmForCausalLM",
        DERIVED | {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": False},
        DERIVED_SIZES
        | {
            "use_qkv_bias": (True, False),
            "qk_layernorm": (True, False),
            "use_parallel_residual": (False, True),
        },
        EXACT,
    ),
    "stablelm_parallel": Family(
        "stablelm",
        "StableLmForCausalLM",
        DERIVED | {"use_parallel_residual": True},
        DERIVED_SIZES,
        EXACT,
    ),
    "nemotron": Family(
        "nemotron",
        "NemotronForCausalLM",
        COMMON | {"attention_bias": True, "mlp_bias": True},
        SIZES | {"attention_bias": (True, False), "mlp_bias": (True, False)},
        EXACT,
    ),
    "jais2": Family("jais2", "Jais2ForCausalLM", COMMON, SIZES, EXACT),
    "gpt_neox_japanese": Family(
        "gpt_neox_japanese",
        "GPTNeoXJapaneseForCausalLM",
        {
            **UNTIED,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "intermediate_multiple_size": 2,
        },
        {"hidden_size": (96, 48), **TIED},
        EXACT,
    ),
    "starcoder2": Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        DERIVED | {"use_bias": True, "sliding_window": 8},
        DERIVED_SIZES | {"use_bias": (True, False)},
        EXACT,
    ),
    "phi": Family(
        "phi",
        "PhiForCausalLM",
        DERIVED | {"qk_layernorm": True},
        DERIVED_SIZES | {"qk_layernorm": (True, False)},
        EXACT,
    ),
    "opt": Family(
        "opt",
        "OPTForCausalLM",
        {
            **UNTIED,
            "hidden_size": 96,
            "ffn_dim": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 96,
        },
        {
            "hidden_size": (96, 48),
            "ffn_dim": (112, 56),
            "word_embed_proj_dim": (96, 48),
            "do_layer_norm_before": (True, False),
            "enable_bias": (True, False),
            "layer_norm_elementwise_affine": (True, False),
            "_remove_final_layer_norm": (False, True),
            **LAYERS,
            **TIED,
        },
        EXACT,
    ),
    "opt_norms_behind": Family(
        "opt",
        "OPTForCausalLM",
        {
            **UNTIED,
            "hidden_size": 96,
            "ffn_dim": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 48,
            "do_layer_norm_before": False,
        },
        {"hidden_size": (96, 48), "ffn_dim": (112, 56), **LAYERS, **TIED},
        EXACT,
    ),
    "biogpt": Family(
        "biogpt",
        "BioGptForCausalLM",
        {
            **UNTIED,
            "hidden_size": 96,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
        },
        {"hidden_size": (96, 48), "scale_embedding": (True, False), **LAYERS, **TIED},
        EXACT,
    ),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", GPT, GPT_SIZES, EXACT),
    "gpt_bigcode": Family(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        GPT | {"multi_query": True},
        GPT_SIZES | {"multi_query": (True, False)},
        EXACT,
    ),
    "gpt_bigcode_heads": Family(
        "gpt_bigcode", "GPTBigCodeForCausalLM", GPT | {"multi_query": False}, GPT_SIZES, EXACT
    ),
    "gpt_neo": Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            **UNTIED,
            "hidden_size": 96,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 6,
            "intermediate_size": 112,
            "window_size": 8,
            "max_position_embeddings": 256,
        },
        {"hidden_size": (96, 48), "intermediate_size": (112, None), **TIED},
    ),
    "gptj": Family(
        "gptj",
        "GPTJForCausalLM",
        GPT | {"rotary_dim": 8},
        GPT_SIZES | {"rotary_dim": (8, 4)},
        EXACT,
    ),
    "codegen": Family(
        "codegen",
        "CodeGenForCausalLM",
        GPT | {"n_head": 8, "rotary_dim": 8},
        GPT_SIZES | {"n_head": (8, 4), "rotary_dim": (8, 4)},
        EXACT,
    ),
    "gpt_neox": Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        DERIVED | {"attention_bias": True},
        DERIVED_SIZES | {"use_parallel_residual": (True, False), "attention_bias": (True, False)},
        EXACT,
    ),
    "persimmon": Family(
        "persimmon",
        "PersimmonForCausalLM",
        DERIVED | {"num_key_value_heads": 6, "qk_layernorm": True},
        {"hidden_size": (96, 48), "qk_layernorm": (True, False), **LAYERS, **TIED},
        EXACT,
    ),
    "bloom": Family(
        "bloom",
        "BloomForCausalLM",
        {**UNTIED, "hidden_size": 96, "n_layer": 2, "n_head": 6},
        {
            "hidden_size": (96, 48),
            "n_head": (6, 3),
            "apply_residual_connection_post_layernorm": (False, True),
            "pretraining_tp": (1, 2),
            "slow_but_exact": (False, True),
            **TIED,
        },
    ),
    "bloom_sliced": Family(
        "bloom",
        "BloomForCausalLM",
        {
            **UNTIED,
            "hidden_size": 96,
            "n_layer": 2,
            "n_head": 6,
            "pretraining_tp": 2,
            "slow_but_exact": True,
        },
        {"hidden_size": (96, 48), "pretraining_tp": (2, 1), **TIED},
        unread=("self_attention.dense.bias", "mlp.dense_4h_to_h.bias"),
    ),
    "falcon_two_norms": Family(
        "falcon",
        "FalconForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        FALCON_SIZES | {"num_kv_heads": (2, 3, 6), "num_ln_in_parallel_attn": (None, 1, 2)},
        EXACT,
    ),
    "falcon_parallel": Family(
        "falcon",
        "FalconForCausalLM",
        FALCON | {"parallel_attn": True, "multi_query": True},
        FALCON_SIZES | {"multi_query": (True, False), "parallel_attn": (True, False)},
        EXACT,
    ),
    "falcon_sequential": Family(
        "falcon",
        "FalconForCausalLM",
        FALCON | {"parallel_attn": False, "multi_query": False, "alibi": True},
        FALCON_SIZES,
        EXACT,
    ),
    "mpt_clipped": Family(
        "mpt",
        "MptForCausalLM",
        {
            **UNTIED,
            "d_model": 96,
            "n_heads": 8,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 0.5},
        },
        {"d_model": (96, 64), **TIED},
    ),
    "mpt": Family(
        "mpt",
        "MptForCausalLM",
        {**UNTIED, "d_model": 96, "n_heads": 8, "n_layers": 2, "max_seq_len": 256},
        {"d_model": (96, 64), "n_heads": (8, 4), "attn_config.clip_qkv": (None, 0.5), **TIED},
    ),
    "cohere_compass_text": Family(
        "cohere_compass_text",
        "CohereCompassForCausalLM",
        {
            **DERIVED,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": None,
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
            },
        },
        {"hidden_size": (96, 48, 192), **TIED},
    ),
}
