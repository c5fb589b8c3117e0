"""Decoders of a shape that no other family has."""

from fastrot.mapping.dense import ATTENTION, INPUT_NORM, LAST_NORM, LLAMA, MLP_NORM, pre_norms
from fastrot.mapping.layernorm import OWN_ATTENTION
from fastrot.mapping.roles import Architecture, Mapping, Untouched

HRM = LLAMA.replace(
    attn_gated=True,
    readers=(r"re:.*self_attn\.gate_proj$",),
    writers=(r"re:.*model\.z_L_init$",),
    feeds={None: (*ATTENTION, "mlp_in", "lm_head")},
    notes="two stacks of layers, run in turn; norms without parameters; a gate between values and "
    "output",
)

MOSHI = LLAMA.replace(
    attn_q=(r"re:.*self_attn\.q_proj\.linear$",),
    attn_k=(r"re:.*self_attn\.k_proj\.linear$",),
    attn_v=(r"re:.*self_attn\.v_proj\.linear$",),
    attn_o=(r"re:.*self_attn\.o_proj\.linear$",),
    mlp_in=(r"re:.*mlp\.fc1$",),
    mlp_out=(r"re:.*mlp\.fc2$",),
    notes="one matrix [gate, up]",
)

XLSTM = Architecture(
    Mapping(
        embedding=(r"re:.*backbone\.embeddings$",),
        readers=(r"re:.*mlstm_layer\.(q|k|v|[ifo]gate_preact)$",),
        writers=(r"re:.*mlstm_layer\.out_proj$",),
        mlp_in=(r"re:.*ffn\.proj_up(_gate)?$",),
        mlp_out=(r"re:.*ffn\.proj_down$",),
        lm_head=("lm_head",),
        ignore=(Untouched(r"re:.*mlstm_layer\.multihead_norm\.weight$", "acts inside the memory"),),
    ),
    pre_norms(r"re:.*\.norm_mlstm$", r"re:.*\.norm_ffn$", r"re:.*backbone\.out_norm$"),
    when={"use_bias": False},
    notes="no attention",
)

XLSTM_BIASED = XLSTM.replace(
    feeds={},
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
    {
        None: rf"re:.*layers\.0\.{MODERNBERT_QKV}",
        r"re:.*layers\.[1-9]\d*\.attn_norm$": rf"re:.*layers\.[1-9]\d*\.{MODERNBERT_QKV}",
        r"re:.*\.mlp_norm$": "mlp_in",
        r"re:.*\.final_norm$": "lm_head",
    },
    kind="layer",
    notes="a norm behind the embedding; the head has two layers",
)

UNHOOKED = "its experts are not those of transformers' interface, where R4 acts behind the gate"

DBRX_OUT = r"re:.*\.ffn\.experts\.mlp\.w2$"

DBRX = Architecture(
    Mapping(
        embedding=(r"re:.*\.wte$",),
        attn=(r"re:.*\.attn$",),
        attn_v=(r"re:.*\.attn\.Wqkv$",),
        attn_v_rows="qkv",
        attn_gated=True,
        attn_o=(r"re:.*\.attn\.out_proj$",),
        mlp_in=(r"re:.*\.ffn\.router\.layer$", r"re:.*\.ffn\.experts\.mlp\.[wv]1$"),
        writers=(DBRX_OUT,),
        lm_head=("lm_head",),
        transposed=(DBRX_OUT,),
    ),
    pre_norms(r"re:.*\.norm_1$", r"re:.*\.norm_2$", r"re:.*\.norm_f$"),
    kind="layer",
    refuses={"R4": UNHOOKED},
    notes="clip_qkv clips values channel by channel; experts are slices of one matrix",
)

JETMOE = Architecture(
    Mapping(
        embedding=LLAMA.mapping.embedding,
        attn=("JetMoeAttention",),
        readers=(
            r"re:.*self_attention\.kv_proj$",
            r"re:.*(mlp|self_attention\.experts)\.router\.layer$",
            r"re:.*(mlp|self_attention\.experts)\.input_linear\.weight$",
        ),
        writers=(
            r"re:.*(mlp|self_attention\.experts)\.output_linear\.weight$",
            r"re:.*(mlp|self_attention\.experts)\.bias$",
        ),
        lm_head=("lm_head",),
    ),
    {
        INPUT_NORM: (
            r"re:.*self_attention\.kv_proj$",
            r"re:.*self_attention\.experts\.(router\.layer|input_linear\.weight)$",
        ),
        MLP_NORM: r"re:.*mlp\.(router\.layer|input_linear\.weight)$",
        LAST_NORM: "lm_head",
    },
    refuses={
        "R2": "keys and values are one matrix [k, v], and the output projections are experts, a "
        "layout that fastrot's table has no words for",
        "R4": UNHOOKED,
    },
    notes="queries and outputs of attention are experts too",
)

CPMANT = Architecture(
    Mapping(
        embedding=(r"re:.*\.(input|segment)_embedding$",),
        attn=(r"re:.*\.self_attention$",),
        attn_q=(r"re:.*\.project_q$",),
        attn_k=(r"re:.*\.project_k$",),
        attn_v=(r"re:.*\.project_v$",),
        attn_o=(r"re:.*\.attention_out$",),
        mlp_in=(r"re:.*ffn\.w_in\.w_[01]$",),
        mlp_out=(r"re:.*\.ffn\.w_out$",),
        lm_head=("lm_head",),
        ignore=(Untouched(r"re:.*\.relative_attention_bias$", "is added to attention's logits"),),
    ),
    pre_norms(
        r"re:.*\.layernorm_before_attention$",
        r"re:.*\.layernorm_before_ffn$",
        r"re:.*\.output_layernorm$",
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
