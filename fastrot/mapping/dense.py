"""Decoders with RMSNorm and one MLP a layer."""

from fastrot.mapping.roles import Architecture, Feeds, Mapping, Norm, Untouched

GATE_UP = (r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$")
HEAD_NORMS = Untouched(
    r"re:.*self_attn\.(q|k|query|key)_(layer)?norm\.weight$",
    "acts on queries and keys, before R3",
)

ATTENTION = ("attn_q", "attn_k", "attn_v", "readers")
INPUT_NORM = r"re:.*\.input_layernorm$"
MLP_NORM = r"re:.*\.post_attention_layernorm$"
LAST_NORM = r"re:.*model\.norm$"


def pre_norms(attention: str = INPUT_NORM, mlp: str = MLP_NORM, last: str = LAST_NORM) -> Feeds:
    """A norm before attention (and what is beside it), one before the MLP, one before the head."""
    return {attention: ATTENTION, mlp: "mlp_in", last: "lm_head"}


def parallel(before: str | None, last: str = LAST_NORM) -> Feeds:
    """One norm, or none, before attention and MLP, and one before the head."""
    return {before: (*ATTENTION, "mlp_in"), last: "lm_head"}


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
    pre_norms(),
)

OUT = (*LLAMA.mapping.attn_o, *LLAMA.mapping.mlp_out)
"""What writes into the norms behind attention and MLP, where there are such."""

QWEN3 = LLAMA.replace(ignore=(HEAD_NORMS,))

GRANITE = LLAMA.replace(notes="scalar multipliers, which commute with rotations")

SINKS = Untouched(r"re:.*self_attn\.sinks$", "logits of the attention sinks")

DIFFERENTIAL = Untouched(
    r"re:.*self_attn\.lambda_[qk][12]$", "weighs the two attention maps that are subtracted"
)

HYPERCLOVAX = GRANITE.replace(
    post_norm=(r"re:.*\.post_norm[12]$",),
    post_norm_in=OUT,
    when={"use_post_norm": True},
)

GLM = LLAMA.replace(mlp_in=(r"re:.*mlp\.gate_up_proj$",), notes="one matrix [gate, up]")

PHI3 = GLM.replace(attn_q=(), attn_k=(), attn_v=(r"re:.*self_attn\.qkv_proj$",), attn_v_rows="qkv")

GLM4 = GLM.replace(post_norm=(r"re:.*\.post_(self_attn|mlp)_layernorm$",), post_norm_in=OUT)

GEMMA = LLAMA.replace(offset=1.0)

FEED_FORWARD_NORM = r"re:.*\.pre_feedforward_layernorm$"

VAULT_GEMMA = GEMMA.replace(feeds=pre_norms(mlp=FEED_FORWARD_NORM))

GEMMA2 = VAULT_GEMMA.replace(
    post_norm=(r"re:.*\.post_(attention|feedforward)_layernorm$",),
    post_norm_in=OUT,
    ignore=(HEAD_NORMS,),
)

GEMMA3N = LLAMA.replace(
    feeds={}, refuses={"R1": "LAuReL adds the scaled output of a norm to the stream"}
)

GEMMA4_UNIFIED = GEMMA2.replace(
    offset=0.0, notes="R2 is online where a layer takes its keys for values"
)

PER_LAYER_IN = (r"re:.*\.per_layer_input_gate$", r"re:.*\.per_layer_model_projection$")
PER_LAYER_OUT = r"re:.*\.per_layer_projection$"

GEMMA4 = GEMMA4_UNIFIED.replace(
    readers=PER_LAYER_IN,
    writers=(PER_LAYER_OUT,),
    post_norm=(*GEMMA2.mapping.post_norm, r"re:.*\.post_per_layer_input_norm$"),
    post_norm_in=(*OUT, PER_LAYER_OUT),
    ignore=(
        HEAD_NORMS,
        Untouched(
            r"re:.*(embed_tokens_per_layer|per_layer_projection_norm)\.weight$",
            "works in the space of the per-layer inputs",
        ),
    ),
    feeds={**GEMMA2.feeds, None: PER_LAYER_IN},
    when={"enable_moe_block": False},
    notes=f"per-layer inputs; {GEMMA4_UNIFIED.notes}",
)

EXPERTS_IN = r"re:.*layers\.\d+\.experts\.gate_up_proj$"
EXPERTS_OUT = r"re:.*layers\.\d+\.experts\.down_proj$"
ROUTER = r"re:.*\.router\.proj$"

GEMMA4_EXPERTS = GEMMA4.replace(
    mlp_in=(*GATE_UP, EXPERTS_IN),
    mlp_out=(*GEMMA4.mapping.mlp_out, EXPERTS_OUT),
    readers=(*PER_LAYER_IN, ROUTER),
    post_norm_in=(*GEMMA4.mapping.post_norm_in, EXPERTS_OUT),
    ignore=(
        *GEMMA4.mapping.ignore,
        Untouched(
            r"re:.*\.post_feedforward_layernorm_[12]\.weight$",
            "stands before the norm that writes into the stream",
        ),
        Untouched(r"re:.*\.router\.per_expert_scale$", "weighs the experts"),
    ),
    feeds={
        **GEMMA4.feeds,
        r"re:.*\.pre_feedforward_layernorm_2$": EXPERTS_IN,
        r"re:.*\.router\.norm$": ROUTER,
        Norm(r"re:.*\.router\.scale$", kind="scale"): ROUTER,
    },
    when={"enable_moe_block": True},
    notes=f"{GEMMA4.notes}; its router scales what it reads by a vector, which is folded too",
)

OLMO2 = GEMMA4_UNIFIED.replace(feeds=parallel(None), notes="no norm before attention and MLP")

BITNET = LLAMA.replace(
    ignore=(Untouched(r"re:.*mlp\.ffn_sub_norm\.weight$", "acts before R4"),),
    feeds={**LLAMA.feeds, r"re:.*\.attn_sub_norm$": "attn_o"},
    notes="the norm before o is folded into it with R2",
)

UNGATED = LLAMA.replace(mlp_in=(r"re:.*mlp\.up_proj$",), notes="MLP without a gate")

APERTUS = UNGATED.replace(
    ignore=(
        HEAD_NORMS,
        Untouched(r"re:.*mlp\.act_fn\.(alpha_p|alpha_n|beta|eps)$", "shape the activation"),
    ),
    feeds=pre_norms(r"re:.*\.attention_layernorm$", r"re:.*\.feedforward_layernorm$"),
)

NANOCHAT = LLAMA.replace(
    mlp_in=(r"re:.*mlp\.fc1$",),
    mlp_out=(r"re:.*mlp\.fc2$",),
    notes="norms without parameters; MLP without a gate",
)

CHAMELEON = LLAMA.replace(
    ignore=(
        Untouched(r"re:.*self_attn\.[qk]_norm\.\w+$", "acts on queries and keys, before R3"),
        Untouched(r"re:.*\.vqmodel\.", "turns a picture into token ids"),
    ),
    when={"swin_norm": False},
)

CHAMELEON_POST = CHAMELEON.replace(
    post_norm=(r"re:.*\.(input|post_attention)_layernorm$",),
    post_norm_in=OUT,
    feeds=OLMO2.feeds,
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
    "diffllama": LLAMA.replace(ignore=(DIFFERENTIAL,)),
    "chameleon": (CHAMELEON, CHAMELEON_POST),
    "granite": GRANITE,
    "granite_swa": GRANITE.replace(ignore=(SINKS,)),
    "hyperclovax": (HYPERCLOVAX, GRANITE.replace(when={"use_post_norm": False})),
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
