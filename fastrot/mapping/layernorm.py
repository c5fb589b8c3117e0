"""Decoders with LayerNorm: R1 fixes the ones vector, so that no module changes."""

from fastrot.mapping.dense import INPUT_NORM, LLAMA, NANOCHAT, UNGATED, parallel, pre_norms
from fastrot.mapping.roles import Architecture, Mapping, Untouched

OWN_ATTENTION = "its attention does not use transformers' attention interface"
CLIPPED = "clip_qkv clips values channel by channel"
QUERY_KEY_NORMS = Untouched(
    r"re:.*self_attn\.[qk]_(layer)?norm\..*$", "acts on queries and keys, before R3"
)


OLMO = LLAMA.replace(kind="layer", when={"clip_qkv": None}, notes="norms without parameters")

STABLELM = OLMO.replace(ignore=(QUERY_KEY_NORMS,), when={"use_parallel_residual": False}, notes="")

STABLELM_PARALLEL = STABLELM.replace(
    feeds=parallel(INPUT_NORM),
    when={"use_parallel_residual": True},
    notes="attention and MLP in parallel behind one norm",
)

COHERE = STABLELM_PARALLEL.replace(when={})

NEMOTRON = UNGATED.replace(kind="layer", offset=1.0)

JAIS2 = NEMOTRON.replace(offset=0.0)

STARCODER2 = LLAMA.replace(
    mlp_in=(r"re:.*mlp\.c_fc$",),
    mlp_out=(r"re:.*mlp\.c_proj$",),
    kind="layer",
    notes="MLP without a gate",
)

PHI = NANOCHAT.replace(
    attn_o=(r"re:.*self_attn\.dense$",),
    ignore=(QUERY_KEY_NORMS,),
    feeds=parallel(INPUT_NORM, r"re:.*model\.final_layernorm$"),
    kind="layer",
    notes="attention and MLP in parallel behind one norm; MLP without a gate",
)

OPT_NORMS = (r"re:.*\.self_attn_layer_norm$", r"re:.*layers\.\d+\.final_layer_norm$")

OPT = Architecture(
    Mapping(
        embedding=(r"re:.*embed_tokens$", r"re:.*embed_positions$"),
        attn=(r"re:.*self_attn$",),
        attn_q=(r"re:.*self_attn\.q_proj$",),
        attn_k=(r"re:.*self_attn\.k_proj$",),
        attn_v=(r"re:.*self_attn\.v_proj$",),
        attn_o=(r"re:.*self_attn\.out_proj$",),
        mlp_in=(r"re:.*\.fc1$",),
        mlp_out=(r"re:.*\.fc2$",),
        lm_head=("lm_head",),
    ),
    pre_norms(*OPT_NORMS, r"re:.*decoder\.final_layer_norm$"),
    kind="layer",
    when={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    notes="learned positions",
)

OPT_POST = OPT.replace(
    when={},
    refuses={"R1": "the output of its norms is the residual stream, and their scale no rotation"},
)

BIOGPT = OPT.replace(
    lm_head=("output_projection",),
    feeds=pre_norms(*OPT_NORMS, r"re:biogpt\.layer_norm$"),
    when={},
)

GPT2 = Architecture(
    Mapping(
        embedding=(r"re:.*\.wte$", r"re:.*\.wpe$"),
        attn=(r"re:.*\.attn$",),
        attn_v=(r"re:.*\.attn\.c_attn$",),
        attn_v_rows="qkv",
        attn_o=(r"re:.*\.attn\.c_proj$",),
        mlp_in=(r"re:.*\.mlp\.c_fc$",),
        mlp_out=(r"re:.*\.mlp\.c_proj$",),
        lm_head=("lm_head",),
    ),
    pre_norms(r"re:.*\.ln_1$", r"re:.*\.ln_2$", r"re:.*\.ln_f$"),
    kind="layer",
    notes="learned positions; MLP without a gate",
)

BIGCODE = GPT2.replace(when={"multi_query": True})
BIGCODE_GROUPED = GPT2.replace(attn_v_rows="grouped", when={"multi_query": False})

GPT_NEO = GPT2.replace(
    attn=(r"re:.*\.attn\.attention$",),
    attn_q=(r"re:.*\.attention\.q_proj$",),
    attn_k=(r"re:.*\.attention\.k_proj$",),
    attn_v=(r"re:.*\.attention\.v_proj$",),
    attn_v_rows="all",
    attn_o=(r"re:.*\.attention\.out_proj$",),
    refuses={"R3": OWN_ATTENTION},
)

GPTJ = GPT2.replace(
    embedding=(r"re:.*\.wte$",),
    attn_q=(r"re:.*\.attn\.q_proj$",),
    attn_k=(r"re:.*\.attn\.k_proj$",),
    attn_v=(r"re:.*\.attn\.v_proj$",),
    attn_v_rows="all",
    attn_o=(r"re:.*\.attn\.out_proj$",),
    mlp_in=(r"re:.*\.mlp\.fc_in$",),
    mlp_out=(r"re:.*\.mlp\.fc_out$",),
    feeds=parallel(r"re:.*\.ln_1$", r"re:.*\.ln_f$"),
    refuses={"R3": OWN_ATTENTION},
    notes="attention and MLP in parallel behind one norm; MLP without a gate",
)

CODEGEN = GPTJ.replace(
    attn_q=(r"re:.*\.attn\.qkv_proj$",),
    attn_k=(),
    attn_v=(),
    attn_gated=True,
    notes="qkv_proj is laid out for four devices; attention and MLP in parallel behind one norm; "
    "MLP without a gate",
)

NEOX = Architecture(
    Mapping(
        embedding=(r"re:.*\.embed_in$",),
        attn=(r"re:.*\.attention$",),
        attn_v=(r"re:.*\.query_key_value$",),
        attn_v_rows="grouped",
        attn_o=(r"re:.*\.attention\.dense$",),
        mlp_in=(r"re:.*\.mlp\.dense_h_to_4h$",),
        mlp_out=(r"re:.*\.mlp\.dense_4h_to_h$",),
        lm_head=("lm_head",),
    ),
    pre_norms(last=r"re:.*\.final_layer_norm$"),
    kind="layer",
    notes="MLP without a gate",
)

NEOX_JAPANESE = NEOX.replace(
    writers=(r"re:.*\.attention\.dense_bias$",),
    lm_head=("embed_out",),
    refuses={"R3": OWN_ATTENTION},
)

PERSIMMON = NEOX.replace(
    embedding=(r"re:.*\.embed_tokens$",),
    attn=(r"re:.*\.self_attn$",),
    attn_o=(r"re:.*\.self_attn\.dense$",),
    ignore=(QUERY_KEY_NORMS,),
    feeds=pre_norms(last=r"re:.*\.final_layernorm$"),
)

FALCON_HEAD_NORM = r"re:.*\.ln_f$"

FALCON = NEOX.replace(
    embedding=(r"re:.*\.word_embeddings$",),
    attn=(r"re:.*\.self_attention$",),
    attn_o=(r"re:.*\.self_attention\.dense$",),
    feeds=pre_norms(last=FALCON_HEAD_NORM),
    when={"parallel_attn": False, "new_decoder_architecture": False},
    refuses={"R3": OWN_ATTENTION},
)

FALCON_PARALLEL = FALCON.replace(
    feeds=parallel(INPUT_NORM, FALCON_HEAD_NORM),
    when={"parallel_attn": True},
    notes="attention and MLP in parallel behind one norm; MLP without a gate",
)

FALCON_TWO_NORMS = FALCON.replace(
    feeds=pre_norms(r"re:.*\.ln_attn$", r"re:.*\.ln_mlp$", FALCON_HEAD_NORM),
    when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    notes="attention and MLP in parallel behind two norms; MLP without a gate",
)

BLOOM = FALCON.replace(
    post_norm=(r"re:.*\.word_embeddings_layernorm$",),
    post_norm_in=FALCON.mapping.embedding,
    when={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
    notes="a norm behind the embedding; MLP without a gate",
)

BLOOM_SLICED = BLOOM.replace(
    when={"apply_residual_connection_post_layernorm": False, "slow_but_exact": True},
    refuses={
        **BLOOM.refuses,
        "R4": "slow_but_exact multiplies by slices of the down projection, past its input",
    },
)

MPT = Architecture(
    Mapping(
        embedding=(r"re:.*\.wte$",),
        attn=(r"re:.*\.attn$",),
        attn_v=(r"re:.*\.attn\.Wqkv$",),
        attn_v_rows="qkv",
        attn_o=(r"re:.*\.attn\.out_proj$",),
        mlp_in=(r"re:.*\.ffn\.up_proj$",),
        mlp_out=(r"re:.*\.ffn\.down_proj$",),
        lm_head=("lm_head",),
    ),
    pre_norms(r"re:.*\.norm_1$", r"re:.*\.norm_2$", r"re:.*\.norm_f$"),
    kind="layer",
    when={"attn_config.clip_qkv": None},
    refuses={"R3": OWN_ATTENTION},
    notes="MLP without a gate",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "olmo": (
        OLMO,
        OLMO.replace(attn_gated=True, when={}, notes=CLIPPED),
    ),
    "cohere": COHERE,
    "cohere2": COHERE,
    "cohere_compass_text": COHERE,
    "stablelm": (STABLELM, STABLELM_PARALLEL),
    "nemotron": NEMOTRON,
    "jais2": JAIS2,
    "starcoder2": STARCODER2,
    "phi": PHI,
    "opt": (OPT, OPT_POST),
    "biogpt": BIOGPT,
    "gpt2": GPT2,
    "gpt_bigcode": (BIGCODE, BIGCODE_GROUPED),
    "gpt_neo": GPT_NEO,
    "gptj": GPTJ,
    "codegen": CODEGEN,
    "gpt_neox": NEOX,
    "gpt_neox_japanese": NEOX_JAPANESE,
    "persimmon": PERSIMMON,
    "bloom": (BLOOM, BLOOM_SLICED),
    "falcon": (FALCON_TWO_NORMS, FALCON_PARALLEL, FALCON),
    "mpt": (
        MPT,
        MPT.replace(attn_gated=True, when={}, notes=CLIPPED),
    ),
}
