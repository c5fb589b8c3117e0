"""Mixtures of experts. All but Phi-MoE have RMSNorm."""

from dataclasses import replace

from fastrot.mapping.dense import LLAMA, SINKS
from fastrot.mapping.roles import Architecture, Mapping, NormMapping, Patterns, Untouched

QUERY_KEY_NORMS = Untouched(
    r"re:.*self_attn\.(q|k|query|key)_(layer)?norm\.weight$",
    "acts on queries and keys, before R3",
)

MLP_IN = (
    r"re:.*mlp\.(shared_experts?\.)?(gate|up)_proj$",
    r"re:.*mlp\.(gate|shared_expert_gate)$",
    r"re:.*mlp\.experts\.gate_up_proj$",
)
"""Dense layers and shared experts, routers and the gate of a shared expert, experts."""

MLP_OUT = (r"re:.*mlp\.((shared_)?experts?\.)?down_proj$",)

QKV = (r"re:.*self_attn\.[qkv]_proj$",)


def pre_norms(mlp_in: Patterns) -> tuple[NormMapping, ...]:
    """The norms of a decoder that has one before attention and one before its MLP."""
    return (
        NormMapping(r"re:.*\.input_layernorm$", QKV),
        NormMapping(r"re:.*\.post_attention_layernorm$", mlp_in),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    )


MOE = Architecture(
    replace(LLAMA.mapping, mlp_in=MLP_IN, mlp_out=MLP_OUT, ignore=(QUERY_KEY_NORMS,)),
    pre_norms(MLP_IN),
    notes="experts are bare parameters, (out, in); the router reads the stream too",
)

ROUTED_IN = (r"re:.*mlp\.(gate|router)$", r"re:.*mlp\.experts\.gate_up_proj$")
ROUTED_OUT = (r"re:.*mlp\.experts\.down_proj$",)
"""Where every layer has experts and nothing else."""

ROUTED = replace(
    MOE,
    mapping=replace(MOE.mapping, mlp_in=ROUTED_IN, mlp_out=ROUTED_OUT),
    norms=pre_norms(ROUTED_IN),
)

CLIPPED = "clip_qkv clips values channel by channel"

ERNIE = replace(
    MOE,
    mapping=replace(
        MOE.mapping,
        ignore=(Untouched(r"re:.*moe_statics\.e_score_correction_bias$", "biases the router"),),
    ),
    notes="bias of the router's choice is a parameter",
)

GPT_OSS = replace(
    ROUTED,
    mapping=replace(ROUTED.mapping, ignore=(SINKS,)),
    notes="experts are (in, out), gate and up interleaved, with biases; attention sinks stay",
)

PHIMOE = Architecture(
    replace(ROUTED.mapping, ignore=()),
    tuple(replace(norm, kind="layer") for norm in ROUTED.norms),
)

FLINT = replace(MOE, mapping=replace(MOE.mapping, ignore=(QUERY_KEY_NORMS, SINKS)))

MIMO = replace(MOE, mapping=replace(MOE.mapping, ignore=(SINKS,)))

MINIMAX_M3_IN = (
    r"re:.*mlp\.gate$",
    r"re:.*mlp\.(experts\.|shared_experts\.)?gate_up_proj$",
)

INDEXER_QK = r"re:.*self_attn\.indexer\.[qk]_proj$"

MINIMAX_M3 = replace(
    MOE,
    mapping=replace(
        MOE.mapping,
        mlp_in=MINIMAX_M3_IN,
        readers=(INDEXER_QK,),
        ignore=(
            QUERY_KEY_NORMS,
            Untouched(
                r"re:.*self_attn\.indexer\.[qk]_norm\.weight$",
                "acts inside the indexer, which chooses the keys that are seen",
            ),
        ),
    ),
    norms=(
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, INDEXER_QK), offset=1.0),
        *(replace(norm, offset=1.0) for norm in pre_norms(MINIMAX_M3_IN)[1:]),
    ),
    notes="some layers have an indexer, which reads the stream too",
)

KOLIBRI = replace(
    MOE,
    mapping=replace(
        MOE.mapping,
        post_norm=(r"re:.*\.post_(self_attn|mlp)_layernorm$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", *MLP_OUT),
    ),
)

HEAD_GATE = r"re:.*self_attn\.g_proj$"

LAGUNA = replace(
    MOE,
    mapping=replace(
        MOE.mapping,
        readers=(HEAD_GATE,),
        ignore=(
            QUERY_KEY_NORMS,
            Untouched(r"re:.*mlp\.gate\.e_score_correction_bias$", "biases the router"),
        ),
    ),
    norms=(NormMapping(r"re:.*\.input_layernorm$", (*QKV, HEAD_GATE)), *MOE.norms[1:]),
    when={"gating": True},
    notes="each head has a gate",
)

LAGUNA_ELEMENTS = replace(
    LAGUNA,
    mapping=replace(LAGUNA.mapping, attn_gated=True),
    when={"gating": "per-element"},
    notes="a gate between values and output",
)

LLAMA4_IN = (
    r"re:.*feed_forward\.(gate|up)_proj$",
    r"re:.*feed_forward\.router$",
    r"re:.*feed_forward\.experts\.gate_up_proj$",
    r"re:.*feed_forward\.shared_expert\.(gate|up)_proj$",
)

LLAMA4 = Architecture(
    replace(
        LLAMA.mapping,
        mlp_in=LLAMA4_IN,
        mlp_out=(r"re:.*feed_forward\.((shared_)?experts?\.)?down_proj$",),
    ),
    pre_norms(LLAMA4_IN),
    notes="experts are (in, out) with a forward of their own; some layers have no RoPE",
)

HUNYUAN_IN = (
    r"re:.*mlp\.gate\.wg$",
    r"re:.*mlp\.experts\.gate_up_proj$",
    r"re:.*mlp\.shared_mlp\.(gate|up)_proj$",
)

HUNYUAN = Architecture(
    replace(
        MOE.mapping,
        mlp_in=HUNYUAN_IN,
        mlp_out=(r"re:.*mlp\.(experts|shared_mlp)\.down_proj$",),
    ),
    pre_norms(HUNYUAN_IN),
    notes="norms on queries and keys after RoPE",
)

GRANITE_IN = (
    r"re:.*block_sparse_moe\.router$",
    r"re:.*block_sparse_moe\.experts\.gate_up_proj$",
    r"re:.*shared_mlp\.input_linear$",
)

GRANITE = Architecture(
    replace(
        LLAMA.mapping,
        mlp_in=GRANITE_IN,
        mlp_out=(
            r"re:.*block_sparse_moe\.experts\.down_proj$",
            r"re:.*shared_mlp\.output_linear$",
        ),
    ),
    pre_norms(GRANITE_IN),
    notes="scalar multipliers, which commute with rotations",
)

FLEX_OLMO = Architecture(
    replace(
        ROUTED.mapping,
        post_norm=(r"re:.*\.post_(attention|feedforward)_layernorm$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", *ROUTED_OUT),
    ),
    (
        NormMapping(None, (*QKV, *ROUTED_IN)),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    ),
    notes="no norm before attention and MLP",
)

AFMOE_IN = (
    r"re:.*mlp\.(gate|up)_proj$",
    r"re:.*mlp\.router\.gate$",
    r"re:.*mlp\.experts\.gate_up_proj$",
    r"re:.*mlp\.shared_experts\.(gate|up)_proj$",
)

AFMOE = Architecture(
    replace(
        MOE.mapping,
        mlp_in=AFMOE_IN,
        attn_gated=True,
        readers=(r"re:.*self_attn\.gate_proj$",),
        post_norm=(r"re:.*\.post_(attention|mlp)_layernorm$",),
        post_norm_in=(r"re:.*self_attn\.o_proj$", *MLP_OUT),
        ignore=(QUERY_KEY_NORMS, Untouched(r"re:.*mlp\.expert_bias$", "biases the router")),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, r"re:.*self_attn\.gate_proj$")),
        NormMapping(r"re:.*\.pre_mlp_layernorm$", AFMOE_IN),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    ),
    notes="norms before and after attention and MLP; a gate between values and output",
)

BEAM = replace(
    AFMOE,
    mapping=replace(
        AFMOE.mapping,
        mlp_in=MLP_IN,
        post_norm=(r"re:.*\.post_(attention|feedforward)_layernorm$",),
        ignore=(
            QUERY_KEY_NORMS,
            Untouched(r"re:.*self_attn\.gate_bias$", "belongs to the gate inside attention"),
        ),
    ),
    norms=(
        AFMOE.norms[0],
        NormMapping(r"re:.*\.pre_feedforward_layernorm$", MLP_IN),
        AFMOE.norms[2],
    ),
)

PARALLEL = Architecture(
    replace(MOE.mapping, ignore=()),
    (
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, *MLP_IN)),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    ),
    notes="one norm feeds attention and experts",
)

PARALLEL_LAYERNORM = replace(
    PARALLEL,
    norms=tuple(replace(norm, kind="layer") for norm in PARALLEL.norms),
    when={"rms_norm_eps": None},
    notes="one LayerNorm feeds attention and experts",
)

MINIMAX = Architecture(
    Mapping(
        # Its linear attention is called self_attn too, and has no R2 or R3.
        attn=("MiniMaxAttention",),
        attn_v=(r"re:.*self_attn\.v_proj$",),
        attn_o=(r"re:.*self_attn\.o_proj$",),
        mlp_out=ROUTED_OUT,
    ),
    (),
    refuses={"R1": "the output of each norm is added to the stream, and its scale is no rotation"},
    notes="linear attention in most layers",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "mixtral": ROUTED,
    "olmoe": (
        replace(ROUTED, when={"clip_qkv": None}),
        replace(ROUTED, mapping=replace(ROUTED.mapping, attn_gated=True), notes=CLIPPED),
    ),
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "glm4_moe": MOE,
    "dots1": MOE,
    "minimax_m2": ROUTED,
    "solar_open": MOE,
    "exaone_moe": MOE,
    "hy_v3": MOE,
    "sarvam_moe": MOE,
    "mellum": ROUTED,
    "flint": FLINT,
    "beam": BEAM,
    "mimo_v2_flash": MIMO,
    "minimax_m3_vl_text": MINIMAX_M3,
    "kolibri1": KOLIBRI,
    "laguna": (LAGUNA, replace(LAGUNA, when={"gating": "per-head"}), LAGUNA_ELEMENTS),
    "ernie4_5_moe": ERNIE,
    "gpt_oss": GPT_OSS,
    "phimoe": PHIMOE,
    "llama4_text": LLAMA4,
    "hunyuan_v1_moe": HUNYUAN,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "granitemoe_swa": replace(GRANITE, mapping=replace(GRANITE.mapping, ignore=(SINKS,))),
    "flex_olmo": FLEX_OLMO,
    "afmoe": AFMOE,
    "minimax": MINIMAX,
    "cohere2_moe": (PARALLEL_LAYERNORM, PARALLEL),
}
