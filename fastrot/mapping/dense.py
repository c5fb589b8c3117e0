"""Decoders with RMSNorm and one MLP a layer."""

from dataclasses import replace

from fastrot.mapping.roles import Architecture, Mapping, NormMapping, Untouched

QKV = (r"re:.*self_attn\.[qkv]_proj$",)
GATE_UP = (r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$")
HEAD_NORMS = Untouched(
    r"re:.*self_attn\.(q|k|query|key)_(layer)?norm\.weight$",
    "acts on queries and keys, before R3",
)

LLAMA = Architecture(
    Mapping(
        embedding=("re:.*embed_tokens$",),
        attn=(r"re:.*self_attn$",),
        attn_q=(r"re:.*self_attn\.q_proj$",),
        attn_k=(r"re:.*self_attn\.k_proj$",),
        attn_v=(r"re:.*self_attn\.v_proj$",),
        attn_o=(r"re:.*self_attn\.o_proj$",),
        mlp_in=GATE_UP,
        mlp_out=(r"re:.*mlp\.down_proj$",),
        lm_head=("lm_head",),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", QKV),
        NormMapping(r"re:.*\.post_attention_layernorm$", GATE_UP),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    ),
)

QWEN3 = replace(LLAMA, mapping=replace(LLAMA.mapping, ignore=(HEAD_NORMS,)))

GRANITE = replace(LLAMA, notes="scalar multipliers, which commute with rotations")

SINKS = Untouched(r"re:.*self_attn\.sinks$", "logits of the attention sinks")

DIFFERENTIAL = Untouched(
    r"re:.*self_attn\.lambda_[qk][12]$", "weighs the two attention maps that are subtracted"
)

HYPERCLOVAX = replace(
    GRANITE,
    mapping=replace(
        LLAMA.mapping,
        post_norm=(r"re:.*\.post_norm[12]$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", r"re:.*mlp\.down_proj$"),
    ),
    when={"use_post_norm": True},
)

GATE_UP_FUSED = (r"re:.*mlp\.gate_up_proj$",)

GLM = Architecture(
    replace(LLAMA.mapping, mlp_in=GATE_UP_FUSED),
    (
        LLAMA.norms[0],
        NormMapping(r"re:.*\.post_attention_layernorm$", GATE_UP_FUSED),
        LLAMA.norms[2],
    ),
    notes="one matrix [gate, up]",
)

PHI3 = Architecture(
    replace(
        GLM.mapping,
        attn_q=(),
        attn_k=(),
        attn_v=(r"re:.*self_attn\.qkv_proj$",),
        attn_v_rows="qkv",
    ),
    (NormMapping(r"re:.*\.input_layernorm$", (r"re:.*self_attn\.qkv_proj$",)), *GLM.norms[1:]),
    notes="one matrix [gate, up]",
)

GLM4 = replace(
    GLM,
    mapping=replace(
        GLM.mapping,
        post_norm=(r"re:.*\.post_(self_attn|mlp)_layernorm$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", r"re:.*mlp\.down_proj$"),
    ),
)

GEMMA = replace(LLAMA, norms=tuple(replace(norm, offset=1.0) for norm in LLAMA.norms))

VAULT_GEMMA = replace(
    GEMMA,
    norms=(
        GEMMA.norms[0],
        NormMapping(r"re:.*\.pre_feedforward_layernorm$", GATE_UP, offset=1.0),
        GEMMA.norms[2],
    ),
)

GEMMA2 = replace(
    VAULT_GEMMA,
    mapping=replace(
        GEMMA.mapping,
        post_norm=(r"re:.*\.post_(attention|feedforward)_layernorm$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", r"re:.*mlp\.down_proj$"),
        ignore=(HEAD_NORMS,),
    ),
)

GEMMA3N = Architecture(
    LLAMA.mapping,
    (),
    refuses={"R1": "LAuReL adds the scaled output of a norm to the stream"},
)

BARE = "R2 is online where a layer takes its keys for values"

GEMMA4 = Architecture(
    replace(
        GEMMA2.mapping,
        readers=(r"re:.*\.per_layer_input_gate$", r"re:.*\.per_layer_model_projection$"),
        writers=(r"re:.*\.per_layer_projection$",),
        post_norm=(*GEMMA2.mapping.post_norm, r"re:.*\.post_per_layer_input_norm$"),
        post_norm_in=(*GEMMA2.mapping.post_norm_in, r"re:.*\.per_layer_projection$"),
        ignore=(
            HEAD_NORMS,
            Untouched(
                r"re:.*(embed_tokens_per_layer|per_layer_projection_norm)\.weight$",
                "works in the space of the per-layer inputs",
            ),
        ),
    ),
    (
        LLAMA.norms[0],
        NormMapping(r"re:.*\.pre_feedforward_layernorm$", GATE_UP),
        LLAMA.norms[2],
        NormMapping(None, (r"re:.*\.per_layer_input_gate$", r"re:.*\.per_layer_model_projection$")),
    ),
    when={"enable_moe_block": False},
    notes=f"per-layer inputs; {BARE}",
)

GEMMA4_EXPERTS = replace(
    GEMMA4,
    mapping=replace(
        GEMMA4.mapping,
        mlp_in=(*GATE_UP, r"re:.*layers\.\d+\.experts\.gate_up_proj$"),
        mlp_out=(r"re:.*mlp\.down_proj$", r"re:.*layers\.\d+\.experts\.down_proj$"),
        readers=(*GEMMA4.mapping.readers, r"re:.*\.router\.proj$"),
        post_norm_in=(
            *GEMMA4.mapping.post_norm_in,
            r"re:.*layers\.\d+\.experts\.down_proj$",
        ),
        ignore=(
            *GEMMA4.mapping.ignore,
            Untouched(
                r"re:.*\.post_feedforward_layernorm_[12]\.weight$",
                "stands before the norm that writes into the stream",
            ),
            Untouched(r"re:.*\.router\.per_expert_scale$", "weighs the experts"),
        ),
    ),
    norms=(
        *GEMMA4.norms,
        NormMapping(
            r"re:.*\.pre_feedforward_layernorm_2$",
            (r"re:.*layers\.\d+\.experts\.gate_up_proj$",),
        ),
        NormMapping(r"re:.*\.router\.norm$", (r"re:.*\.router\.proj$",)),
        NormMapping(r"re:.*\.router\.scale$", (r"re:.*\.router\.proj$",), kind="scale"),
    ),
    when={"enable_moe_block": True},
    notes=f"{GEMMA4.notes}; its router scales what it reads by a vector, which is folded too",
)

GEMMA4_UNIFIED = Architecture(
    GEMMA2.mapping,
    (*GEMMA4.norms[:3],),
    notes=BARE,
)

OLMO2 = Architecture(
    GEMMA2.mapping,
    (NormMapping(None, (*QKV, *GATE_UP)), LLAMA.norms[2]),
    notes="no norm before attention and MLP",
)

BITNET = replace(
    LLAMA,
    mapping=replace(
        LLAMA.mapping,
        ignore=(Untouched(r"re:.*mlp\.ffn_sub_norm\.weight$", "acts before R4"),),
    ),
    norms=(*LLAMA.norms, NormMapping(r"re:.*\.attn_sub_norm$", (r"re:.*self_attn\.o_proj$",))),
    notes="the norm before o is folded into it with R2",
)

UNGATED = Architecture(
    replace(LLAMA.mapping, mlp_in=(r"re:.*mlp\.up_proj$",)),
    (
        LLAMA.norms[0],
        NormMapping(r"re:.*\.post_attention_layernorm$", (r"re:.*mlp\.up_proj$",)),
        LLAMA.norms[2],
    ),
    notes="MLP without a gate",
)

APERTUS = Architecture(
    replace(
        UNGATED.mapping,
        ignore=(
            HEAD_NORMS,
            Untouched(r"re:.*mlp\.act_fn\.(alpha_p|alpha_n|beta|eps)$", "shape the activation"),
        ),
    ),
    (
        NormMapping(r"re:.*\.attention_layernorm$", QKV),
        NormMapping(r"re:.*\.feedforward_layernorm$", (r"re:.*mlp\.up_proj$",)),
        LLAMA.norms[2],
    ),
    notes="MLP without a gate",
)

NANOCHAT = Architecture(
    replace(LLAMA.mapping, mlp_in=(r"re:.*mlp\.fc1$",), mlp_out=(r"re:.*mlp\.fc2$",)),
    (
        LLAMA.norms[0],
        NormMapping(r"re:.*\.post_attention_layernorm$", (r"re:.*mlp\.fc1$",)),
        LLAMA.norms[2],
    ),
    notes="norms without parameters; MLP without a gate",
)

CHAMELEON = replace(
    LLAMA,
    mapping=replace(
        LLAMA.mapping,
        ignore=(
            Untouched(r"re:.*self_attn\.[qk]_norm\.\w+$", "acts on queries and keys, before R3"),
            Untouched(r"re:.*\.vqmodel\.", "turns a picture into token ids"),
        ),
    ),
    when={"swin_norm": False},
)

CHAMELEON_POST = replace(
    CHAMELEON,
    mapping=replace(
        CHAMELEON.mapping,
        post_norm=(r"re:.*\.(input|post_attention)_layernorm$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", r"re:.*mlp\.down_proj$"),
    ),
    norms=OLMO2.norms,
    when={"swin_norm": True},
    notes="no norm before attention and MLP",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "smollm3": LLAMA,
    "ernie4_5": LLAMA,
    "internlm3": LLAMA,
    "qwen2": LLAMA,
    "seed_oss": LLAMA,
    "emu3_text_model": LLAMA,
    "helium": LLAMA,
    "cwm": LLAMA,
    "exaone": LLAMA,
    "iquestcoder": LLAMA,
    "diffllama": replace(LLAMA, mapping=replace(LLAMA.mapping, ignore=(DIFFERENTIAL,))),
    "chameleon": (CHAMELEON, CHAMELEON_POST),
    "granite": GRANITE,
    "granite_swa": replace(GRANITE, mapping=replace(LLAMA.mapping, ignore=(SINKS,))),
    "hyperclovax": (HYPERCLOVAX, replace(GRANITE, when={"use_post_norm": False})),
    "qwen3": QWEN3,
    "hunyuan_v1_dense": QWEN3,
    "glm": GLM,
    "phi3": PHI3,
    "glm4": GLM4,
    "gemma": GEMMA,
    "vaultgemma": VAULT_GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": (GEMMA4, GEMMA4_EXPERTS),
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "exaone4": OLMO2,
    "bitnet": BITNET,
    "arcee": UNGATED,
    "apertus": APERTUS,
    "apertus1p5_text": APERTUS,
    "nanochat": NANOCHAT,
}
