"""Decoders with LayerNorm: R1 fixes the ones vector, so that no module changes."""

from dataclasses import replace

from fastrot.mapping.dense import LLAMA, QKV
from fastrot.mapping.roles import Architecture, Mapping, NormMapping, Untouched

OWN_ATTENTION = "its attention does not use transformers' attention interface"
CLIPPED = "clip_qkv clips values channel by channel"
QUERY_KEY_NORMS = Untouched(
    r"re:.*self_attn\.[qk]_(layer)?norm\..*$", "acts on queries and keys, before R3"
)


def _layer(norm: str | None, *readers: str, offset: float = 0.0) -> NormMapping:
    return NormMapping(norm, readers, offset=offset, kind="layer")


GATE_UP = (r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$")

COHERE = Architecture(
    replace(LLAMA.mapping, ignore=(QUERY_KEY_NORMS,)),
    (
        _layer(r"re:.*\.input_layernorm$", *QKV, *GATE_UP),
        _layer(r"re:.*model\.norm$", "lm_head"),
    ),
    notes="attention and MLP in parallel behind one norm",
)

OLMO = Architecture(
    LLAMA.mapping,
    (
        _layer(r"re:.*\.input_layernorm$", *QKV),
        _layer(r"re:.*\.post_attention_layernorm$", *GATE_UP),
        _layer(r"re:.*model\.norm$", "lm_head"),
    ),
    when={"clip_qkv": None},
    notes="norms without parameters",
)

STABLELM = Architecture(
    replace(LLAMA.mapping, ignore=(QUERY_KEY_NORMS,)),
    OLMO.norms,
    when={"use_parallel_residual": False},
)

STABLELM_PARALLEL = replace(COHERE, when={"use_parallel_residual": True})

NEMOTRON = Architecture(
    replace(LLAMA.mapping, mlp_in=(r"re:.*mlp\.up_proj$",)),
    (
        _layer(r"re:.*\.input_layernorm$", *QKV, offset=1.0),
        _layer(r"re:.*\.post_attention_layernorm$", r"re:.*mlp\.up_proj$", offset=1.0),
        _layer(r"re:.*model\.norm$", "lm_head", offset=1.0),
    ),
    notes="MLP without a gate",
)

JAIS2 = replace(NEMOTRON, norms=tuple(replace(norm, offset=0.0) for norm in NEMOTRON.norms))

STARCODER2 = Architecture(
    replace(LLAMA.mapping, mlp_in=(r"re:.*mlp\.c_fc$",), mlp_out=(r"re:.*mlp\.c_proj$",)),
    (
        _layer(r"re:.*\.input_layernorm$", *QKV),
        _layer(r"re:.*\.post_attention_layernorm$", r"re:.*mlp\.c_fc$"),
        _layer(r"re:.*model\.norm$", "lm_head"),
    ),
    notes="MLP without a gate",
)

PHI = Architecture(
    replace(
        LLAMA.mapping,
        attn_o=(r"re:.*self_attn\.dense$",),
        mlp_in=(r"re:.*mlp\.fc1$",),
        mlp_out=(r"re:.*mlp\.fc2$",),
        ignore=(QUERY_KEY_NORMS,),
    ),
    (
        _layer(r"re:.*\.input_layernorm$", *QKV, r"re:.*mlp\.fc1$"),
        _layer(r"re:.*model\.final_layernorm$", "lm_head"),
    ),
    notes="attention and MLP in parallel behind one norm; MLP without a gate",
)

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
    (
        _layer(r"re:.*\.self_attn_layer_norm$", *QKV),
        _layer(r"re:.*layers\.\d+\.final_layer_norm$", r"re:.*\.fc1$"),
        _layer(r"re:.*decoder\.final_layer_norm$", "lm_head"),
    ),
    when={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    notes="learned positions",
)

OPT_POST = replace(
    OPT,
    when={},
    refuses={"R1": "the output of its norms is the residual stream, and their scale no rotation"},
)

BIOGPT = replace(
    OPT,
    mapping=replace(OPT.mapping, lm_head=("output_projection",)),
    norms=(
        *OPT.norms[:2],
        _layer(r"re:biogpt\.layer_norm$", "output_projection"),
    ),
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
    (
        _layer(r"re:.*\.ln_1$", r"re:.*\.attn\.c_attn$"),
        _layer(r"re:.*\.ln_2$", r"re:.*\.mlp\.c_fc$"),
        _layer(r"re:.*\.ln_f$", "lm_head"),
    ),
    notes="learned positions; MLP without a gate",
)

BIGCODE = replace(GPT2, when={"multi_query": True})
BIGCODE_GROUPED = replace(
    GPT2, mapping=replace(GPT2.mapping, attn_v_rows="grouped"), when={"multi_query": False}
)

GPT_NEO_QKV = (r"re:.*\.attn\.attention\.[qkv]_proj$",)

GPT_NEO = Architecture(
    replace(
        GPT2.mapping,
        attn=(r"re:.*\.attn\.attention$",),
        attn_q=(r"re:.*\.attention\.q_proj$",),
        attn_k=(r"re:.*\.attention\.k_proj$",),
        attn_v=(r"re:.*\.attention\.v_proj$",),
        attn_v_rows="all",
        attn_o=(r"re:.*\.attention\.out_proj$",),
    ),
    (_layer(r"re:.*\.ln_1$", *GPT_NEO_QKV), *GPT2.norms[1:]),
    refuses={"R3": OWN_ATTENTION},
    notes="learned positions; MLP without a gate",
)

GPTJ_QKV = (r"re:.*\.attn\.[qkv]_proj$",)

GPTJ = Architecture(
    replace(
        GPT2.mapping,
        embedding=(r"re:.*\.wte$",),
        attn_q=(r"re:.*\.attn\.q_proj$",),
        attn_k=(r"re:.*\.attn\.k_proj$",),
        attn_v=(r"re:.*\.attn\.v_proj$",),
        attn_v_rows="all",
        attn_o=(r"re:.*\.attn\.out_proj$",),
        mlp_in=(r"re:.*\.mlp\.fc_in$",),
        mlp_out=(r"re:.*\.mlp\.fc_out$",),
    ),
    (
        _layer(r"re:.*\.ln_1$", *GPTJ_QKV, r"re:.*\.mlp\.fc_in$"),
        _layer(r"re:.*\.ln_f$", "lm_head"),
    ),
    refuses={"R3": OWN_ATTENTION},
    notes="attention and MLP in parallel behind one norm; MLP without a gate",
)

CODEGEN = replace(
    GPTJ,
    mapping=replace(
        GPTJ.mapping,
        attn_q=(r"re:.*\.attn\.qkv_proj$",),
        attn_k=(),
        attn_v=(),
        attn_gated=True,
    ),
    norms=(
        _layer(r"re:.*\.ln_1$", r"re:.*\.attn\.qkv_proj$", r"re:.*\.mlp\.fc_in$"),
        GPTJ.norms[1],
    ),
    notes="qkv_proj is laid out for four devices; attention and MLP in parallel behind one norm; "
    "MLP without a gate",
)

NEOX_IN = (r"re:.*\.mlp\.dense_h_to_4h$",)

NEOX = Architecture(
    Mapping(
        embedding=(r"re:.*\.embed_in$",),
        attn=(r"re:.*\.attention$",),
        attn_v=(r"re:.*\.query_key_value$",),
        attn_v_rows="grouped",
        attn_o=(r"re:.*\.attention\.dense$",),
        mlp_in=NEOX_IN,
        mlp_out=(r"re:.*\.mlp\.dense_4h_to_h$",),
        lm_head=("lm_head",),
    ),
    (
        _layer(r"re:.*\.input_layernorm$", r"re:.*\.query_key_value$"),
        _layer(r"re:.*\.post_attention_layernorm$", *NEOX_IN),
        _layer(r"re:.*\.final_layer_norm$", "lm_head"),
    ),
    notes="MLP without a gate",
)

NEOX_JAPANESE = replace(
    NEOX,
    mapping=replace(
        NEOX.mapping, writers=(r"re:.*\.attention\.dense_bias$",), lm_head=("embed_out",)
    ),
    norms=(*NEOX.norms[:2], _layer(r"re:.*\.final_layer_norm$", "embed_out")),
    refuses={"R3": OWN_ATTENTION},
)

PERSIMMON = Architecture(
    replace(
        NEOX.mapping,
        embedding=(r"re:.*\.embed_tokens$",),
        attn=(r"re:.*\.self_attn$",),
        attn_o=(r"re:.*\.self_attn\.dense$",),
        lm_head=("lm_head",),
        ignore=(QUERY_KEY_NORMS,),
    ),
    (*NEOX.norms[:2], _layer(r"re:.*\.final_layernorm$", "lm_head")),
    notes="MLP without a gate",
)

BLOOM = Architecture(
    replace(
        NEOX.mapping,
        embedding=(r"re:.*\.word_embeddings$",),
        attn=(r"re:.*\.self_attention$",),
        attn_o=(r"re:.*\.self_attention\.dense$",),
        lm_head=("lm_head",),
        post_norm=(r"re:.*\.word_embeddings_layernorm$",),
        post_norm_in=(r"re:.*\.word_embeddings$",),
    ),
    (*NEOX.norms[:2], _layer(r"re:.*\.ln_f$", "lm_head")),
    when={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
    refuses={"R3": OWN_ATTENTION},
    notes="a norm behind the embedding; MLP without a gate",
)

BLOOM_SLICED = replace(
    BLOOM,
    when={"apply_residual_connection_post_layernorm": False, "slow_but_exact": True},
    refuses={
        **BLOOM.refuses,
        "R4": "slow_but_exact multiplies by slices of the down projection, past its input",
    },
)

FALCON = Architecture(
    replace(BLOOM.mapping, post_norm=(), post_norm_in=()),
    BLOOM.norms,
    when={"parallel_attn": False, "new_decoder_architecture": False},
    refuses={"R3": OWN_ATTENTION},
    notes="MLP without a gate",
)

FALCON_PARALLEL = replace(
    FALCON,
    norms=(
        _layer(r"re:.*\.input_layernorm$", r"re:.*\.query_key_value$", *NEOX_IN),
        FALCON.norms[2],
    ),
    when={"parallel_attn": True},
    notes="attention and MLP in parallel behind one norm; MLP without a gate",
)

FALCON_TWO_NORMS = replace(
    FALCON,
    norms=(
        _layer(r"re:.*\.ln_attn$", r"re:.*\.query_key_value$"),
        _layer(r"re:.*\.ln_mlp$", *NEOX_IN),
        FALCON.norms[2],
    ),
    when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    notes="attention and MLP in parallel behind two norms; MLP without a gate",
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
    (
        _layer(r"re:.*\.norm_1$", r"re:.*\.attn\.Wqkv$"),
        _layer(r"re:.*\.norm_2$", r"re:.*\.ffn\.up_proj$"),
        _layer(r"re:.*\.norm_f$", "lm_head"),
    ),
    when={"attn_config.clip_qkv": None},
    refuses={"R3": OWN_ATTENTION},
    notes="MLP without a gate",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "olmo": (
        OLMO,
        replace(OLMO, mapping=replace(OLMO.mapping, attn_gated=True), when={}, notes=CLIPPED),
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
        replace(MPT, mapping=replace(MPT.mapping, attn_gated=True), when={}, notes=CLIPPED),
    ),
}
