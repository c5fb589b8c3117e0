"""Decoders of a shape that no other family has."""

from dataclasses import replace

from fastrot.mapping.dense import GATE_UP, LLAMA
from fastrot.mapping.layernorm import OWN_ATTENTION
from fastrot.mapping.roles import Architecture, Mapping, NormMapping, Untouched

GATE = r"re:.*self_attn\.gate_proj$"

HRM = Architecture(
    replace(LLAMA.mapping, attn_gated=True, readers=(GATE,), writers=(r"re:.*model\.z_L_init$",)),
    (NormMapping(None, (*LLAMA.norms[0].linears, GATE, *GATE_UP, "lm_head")),),
    notes="two stacks of layers, run in turn; norms without parameters; a gate between values and "
    "output",
)

MOSHI = Architecture(
    replace(
        LLAMA.mapping,
        attn_q=(r"re:.*self_attn\.q_proj\.linear$",),
        attn_k=(r"re:.*self_attn\.k_proj\.linear$",),
        attn_v=(r"re:.*self_attn\.v_proj\.linear$",),
        attn_o=(r"re:.*self_attn\.o_proj\.linear$",),
        mlp_in=(r"re:.*mlp\.fc1$",),
        mlp_out=(r"re:.*mlp\.fc2$",),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", (r"re:.*self_attn\.[qkv]_proj\.linear$",)),
        NormMapping(r"re:.*\.post_attention_layernorm$", (r"re:.*mlp\.fc1$",)),
        LLAMA.norms[2],
    ),
    notes="one matrix [gate, up]",
)

XLSTM_IN = r"re:.*mlstm_layer\.(q|k|v|[ifo]gate_preact)$"
XLSTM_UP = r"re:.*ffn\.proj_up(_gate)?$"

XLSTM = Architecture(
    Mapping(
        embedding=(r"re:.*backbone\.embeddings$",),
        readers=(XLSTM_IN,),
        writers=(r"re:.*mlstm_layer\.out_proj$",),
        mlp_in=(XLSTM_UP,),
        mlp_out=(r"re:.*ffn\.proj_down$",),
        lm_head=("lm_head",),
        ignore=(Untouched(r"re:.*mlstm_layer\.multihead_norm\.weight$", "acts inside the memory"),),
    ),
    (
        NormMapping(r"re:.*\.norm_mlstm$", (XLSTM_IN,)),
        NormMapping(r"re:.*\.norm_ffn$", (XLSTM_UP,)),
        NormMapping(r"re:.*backbone\.out_norm$", ("lm_head",)),
    ),
    when={"use_bias": False},
    notes="no attention",
)

XLSTM_BIASED = replace(
    XLSTM,
    norms=(),
    when={"use_bias": True},
    refuses={"R1": "its RMSNorms have biases, which only a norm that centres may have"},
)

MODERNBERT_QKV = r"attn\.[qkv]_proj$"

MODERNBERT = Architecture(
    Mapping(
        embedding=(r"re:.*\.tok_embeddings$",),
        attn=(r"re:.*\.attn$",),
        attn_q=(r"re:.*\.attn\.q_proj$",),
        attn_k=(r"re:.*\.attn\.k_proj$",),
        attn_v=(r"re:.*\.attn\.v_proj$",),
        attn_o=(r"re:.*\.attn\.Wo$",),
        mlp_in=(r"re:.*\.mlp\.Wi$",),
        mlp_out=(r"re:.*\.mlp\.Wo$",),
        lm_head=(r"re:lm_head\.dense$",),
        post_norm=(r"re:.*\.embeddings\.norm$",),
        post_norm_in=(r"re:.*\.tok_embeddings$",),
        ignore=(
            Untouched(r"re:(lm_head\.norm|decoder)\.\w+$", "stands behind the head's first layer"),
        ),
    ),
    (
        NormMapping(None, (rf"re:.*layers\.0\.{MODERNBERT_QKV}",), kind="layer"),
        NormMapping(
            r"re:.*layers\.[1-9]\d*\.attn_norm$",
            (rf"re:.*layers\.[1-9]\d*\.{MODERNBERT_QKV}",),
            kind="layer",
        ),
        NormMapping(r"re:.*\.mlp_norm$", (r"re:.*\.mlp\.Wi$",), kind="layer"),
        NormMapping(r"re:.*\.final_norm$", (r"re:lm_head\.dense$",), kind="layer"),
    ),
    notes="a norm behind the embedding; the head has two layers",
)

UNHOOKED = "its experts are not those of transformers' interface, where R4 acts behind the gate"

DBRX_IN = (r"re:.*\.ffn\.router\.layer$", r"re:.*\.ffn\.experts\.mlp\.[wv]1$")
DBRX_OUT = r"re:.*\.ffn\.experts\.mlp\.w2$"

DBRX = Architecture(
    Mapping(
        embedding=(r"re:.*\.wte$",),
        attn=(r"re:.*\.attn$",),
        attn_v=(r"re:.*\.attn\.Wqkv$",),
        attn_v_rows="qkv",
        attn_gated=True,
        attn_o=(r"re:.*\.attn\.out_proj$",),
        mlp_in=DBRX_IN,
        writers=(DBRX_OUT,),
        lm_head=("lm_head",),
        transposed=(DBRX_OUT,),
    ),
    (
        NormMapping(r"re:.*\.norm_1$", (r"re:.*\.attn\.Wqkv$",), kind="layer"),
        NormMapping(r"re:.*\.norm_2$", DBRX_IN, kind="layer"),
        NormMapping(r"re:.*\.norm_f$", ("lm_head",), kind="layer"),
    ),
    refuses={"R4": UNHOOKED},
    notes="clip_qkv clips values channel by channel; experts are slices of one matrix",
)

JETMOE_IN = (
    r"re:.*(mlp|self_attention\.experts)\.router\.layer$",
    r"re:.*(mlp|self_attention\.experts)\.input_linear\.weight$",
)
JETMOE_OUT = (
    r"re:.*(mlp|self_attention\.experts)\.output_linear\.weight$",
    r"re:.*(mlp|self_attention\.experts)\.bias$",
)

JETMOE = Architecture(
    Mapping(
        embedding=LLAMA.mapping.embedding,
        attn=("JetMoeAttention",),
        readers=(r"re:.*self_attention\.kv_proj$", *JETMOE_IN),
        writers=JETMOE_OUT,
        lm_head=("lm_head",),
    ),
    (
        NormMapping(
            r"re:.*\.input_layernorm$",
            (
                r"re:.*self_attention\.kv_proj$",
                r"re:.*self_attention\.experts\.(router\.layer|input_linear\.weight)$",
            ),
        ),
        NormMapping(
            r"re:.*\.post_attention_layernorm$",
            (r"re:.*mlp\.(router\.layer|input_linear\.weight)$",),
        ),
        LLAMA.norms[2],
    ),
    refuses={
        "R2": "keys and values are one matrix [k, v], and the output projections are experts, a "
        "layout that fastrot's table has no words for",
        "R4": UNHOOKED,
    },
    notes="queries and outputs of attention are experts too",
)

CPMANT_QKV = r"re:.*self_attention\.project_[qkv]$"
CPMANT_IN = r"re:.*ffn\.w_in\.w_[01]$"

CPMANT = Architecture(
    Mapping(
        embedding=(r"re:.*\.(input|segment)_embedding$",),
        attn=(r"re:.*\.self_attention$",),
        attn_q=(r"re:.*\.project_q$",),
        attn_k=(r"re:.*\.project_k$",),
        attn_v=(r"re:.*\.project_v$",),
        attn_o=(r"re:.*\.attention_out$",),
        mlp_in=(CPMANT_IN,),
        mlp_out=(r"re:.*\.ffn\.w_out$",),
        lm_head=("lm_head",),
        ignore=(Untouched(r"re:.*\.relative_attention_bias$", "is added to attention's logits"),),
    ),
    (
        NormMapping(r"re:.*\.layernorm_before_attention$", (CPMANT_QKV,)),
        NormMapping(r"re:.*\.layernorm_before_ffn$", (CPMANT_IN,)),
        NormMapping(r"re:.*\.output_layernorm$", ("lm_head",)),
    ),
    refuses={"R3": OWN_ATTENTION},
    notes="prompts and segments have embeddings",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "hrm_text": HRM,
    "moshi": MOSHI,
    "xlstm": (XLSTM, XLSTM_BIASED),
    "modernbert-decoder": MODERNBERT,
    "dbrx": DBRX,
    "jetmoe": JETMOE,
    "cpmant": CPMANT,
}
