"""Decoders of a shape that no other family has."""

from typing import Any

from zoo import Family
from zoo.dense import COMMON, DERIVED
from zoo.experts import without

UNGROUPED: dict[str, Any] = without(DERIVED, "num_key_value_heads")

DBRX: dict[str, Any] = {
    "d_model": 96,
    "n_heads": 6,
    "n_layers": 2,
    "max_seq_len": 256,
    "vocab_size": 64,
    "attn_config": {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 1e4},
    "ffn_config": {
        "hidden_size": 96,
        "ffn_hidden_size": 56,
        "moe_num_experts": 4,
        "moe_top_k": 2,
    },
}

XLSTM: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "ffn_round_up_to_multiple_of": 8,
    "chunk_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Family] = {
    "hrm_text": Family(
        "hrm_text",
        "HrmTextForCausalLM",
        {
            **without(without(COMMON, "num_hidden_layers"), "num_key_value_heads"),
            "num_layers_per_stack": 1,
            "H_cycles": 2,
            "L_cycles": 2,
            "embedding_scale": 1.0,  # else little is seen of where the second stack begins
            "attention_bias": True,
        },
        {"hidden_size": (96, 48), "tie_word_embeddings": (False, True)},
    ),
    "moshi": Family(
        "moshi",
        "MoshiForCausalLM",
        {
            **without(COMMON, "intermediate_size"),
            "ffn_dim": 112,
            "num_codebooks": 2,
            "sliding_window": 8,
        },
        {"hidden_size": (96, 48), "num_key_value_heads": (2, 1, 6)},
    ),
    "xlstm": Family("xlstm", "xLSTMForCausalLM", XLSTM, {"hidden_size": (128, 256)}),
    "xlstm_biased": Family(
        "xlstm", "xLSTMForCausalLM", {**XLSTM, "use_bias": True}, {"hidden_size": (128, 256)}
    ),
    "modernbert-decoder": Family(
        "modernbert-decoder",
        "ModernBertDecoderForCausalLM",
        {
            **UNGROUPED,
            "layer_types": ["full_attention", "sliding_attention"],
            "local_attention": 16,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "tie_word_embeddings": True,
        },
        {
            "hidden_size": (96, 48),
            "norm_bias": (True, False),
            "mlp_bias": (True, False),
            "tie_word_embeddings": (True, False),
        },
    ),
    "dbrx": Family("dbrx", "DbrxForCausalLM", DBRX, {"n_heads": (6, 12)}),
    "jetmoe": Family(
        "jetmoe",
        "JetMoeForCausalLM",
        {
            **without(without(COMMON, "num_attention_heads"), "head_dim"),
            "kv_channels": 16,
            "num_key_value_heads": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        {"hidden_size": (96, 48), "tie_word_embeddings": (False, True)},
    ),
    "cpmant": Family(
        "cpmant",
        "CpmAntForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 96,
            "num_attention_heads": 6,
            "dim_head": 16,
            "dim_ff": 112,
            "num_hidden_layers": 2,
            "prompt_types": 3,
            "prompt_length": 4,
            "segment_types": 3,
            "position_bias_num_buckets": 8,
            "position_bias_max_distance": 16,
            "tie_word_embeddings": False,
        },
        {"hidden_size": (96, 48), "dim_ff": (112, 56)},
    ),
}
