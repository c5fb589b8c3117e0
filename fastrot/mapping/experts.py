"""Mixtures of experts. All but Phi-MoE have RMSNorm."""

from fastrot.mapping.dense import INPUT_NORM, LLAMA, SINKS, parallel, pre_norms
from fastrot.mapping.roles import Architecture, Mapping, Untouched

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

MOE = LLAMA.replace(
    mlp_in=MLP_IN,
    mlp_out=MLP_OUT,
    ignore=(QUERY_KEY_NORMS,),
    notes="experts are bare parameters, (out, in); the router reads the stream too",
)

ROUTED_OUT = (r"re:.*mlp\.experts\.down_proj$",)

ROUTED = MOE.replace(
    mlp_in=(r"re:.*mlp\.(gate|router)$", r"re:.*mlp\.experts\.gate_up_proj$"),
    mlp_out=ROUTED_OUT,
)
"""Where every layer has experts and nothing else."""

CLIPPED = "clip_qkv clips values channel by channel"

ERNIE = MOE.replace(
    ignore=(Untouched(r"re:.*moe_statics\.e_score_correction_bias$", "biases the router"),),
    notes="bias of the router's choice is a parameter",
)

GPT_OSS = ROUTED.replace(
    ignore=(SINKS,),
    notes="experts are (in, out), gate and up interleaved, with biases; attention sinks stay",
)

PHIMOE = ROUTED.replace(ignore=(), kind="layer", notes="")

FLINT = MOE.replace(ignore=(QUERY_KEY_NORMS, SINKS))

MIMO = MOE.replace(ignore=(SINKS,))

MINIMAX_M3 = MOE.replace(
    mlp_in=(r"re:.*mlp\.gate$", r"re:.*mlp\.(experts\.|shared_experts\.)?gate_up_proj$"),
    readers=(r"re:.*self_attn\.indexer\.[qk]_proj$",),
    ignore=(
        QUERY_KEY_NORMS,
        Untouched(
            r"re:.*self_attn\.indexer\.[qk]_norm\.weight$",
            "acts inside the indexer, which chooses the keys that are seen",
        ),
    ),
    offset=1.0,
    notes="some layers have an indexer, which reads the stream too",
)

KOLIBRI = MOE.replace(
    post_norm=(r"re:.*\.post_(self_attn|mlp)_layernorm$",),
    post_norm_in=(*LLAMA.mapping.attn_o, *MLP_OUT),
)

HEAD_GATE = r"re:.*self_attn\.g_proj$"

LAGUNA = MOE.replace(
    readers=(HEAD_GATE,),
    ignore=(
        QUERY_KEY_NORMS,
        Untouched(r"re:.*mlp\.gate\.e_score_correction_bias$", "biases the router"),
    ),
    when={"gating": True},
    notes="each head has a gate",
)

LAGUNA_ELEMENTS = LAGUNA.replace(
    attn_gated=True, when={"gating": "per-element"}, notes="a gate between values and output"
)

LLAMA4 = LLAMA.replace(
    mlp_in=(
        r"re:.*feed_forward\.(gate|up)_proj$",
        r"re:.*feed_forward\.router$",
        r"re:.*feed_forward\.experts\.gate_up_proj$",
        r"re:.*feed_forward\.shared_expert\.(gate|up)_proj$",
    ),
    mlp_out=(r"re:.*feed_forward\.((shared_)?experts?\.)?down_proj$",),
    notes="experts are (in, out) with a forward of their own; some layers have no RoPE",
)

HUNYUAN = MOE.replace(
    mlp_in=(
        r"re:.*mlp\.gate\.wg$",
        r"re:.*mlp\.experts\.gate_up_proj$",
        r"re:.*mlp\.shared_mlp\.(gate|up)_proj$",
    ),
    mlp_out=(r"re:.*mlp\.(experts|shared_mlp)\.down_proj$",),
    notes="norms on queries and keys after RoPE",
)

GRANITE = LLAMA.replace(
    mlp_in=(
        r"re:.*block_sparse_moe\.router$",
        r"re:.*block_sparse_moe\.experts\.gate_up_proj$",
        r"re:.*shared_mlp\.input_linear$",
    ),
    mlp_out=(r"re:.*block_sparse_moe\.experts\.down_proj$", r"re:.*shared_mlp\.output_linear$"),
    notes="scalar multipliers, which commute with rotations",
)

FLEX_OLMO = ROUTED.replace(
    post_norm=(r"re:.*\.post_(attention|feedforward)_layernorm$",),
    post_norm_in=(*LLAMA.mapping.attn_o, *ROUTED_OUT),
    feeds=parallel(None),
    notes="no norm before attention and MLP",
)

BEAM = MOE.replace(
    attn_gated=True,
    readers=(r"re:.*self_attn\.gate_proj$",),
    post_norm=(r"re:.*\.post_(attention|feedforward)_layernorm$",),
    post_norm_in=(*LLAMA.mapping.attn_o, *MLP_OUT),
    ignore=(
        QUERY_KEY_NORMS,
        Untouched(r"re:.*self_attn\.gate_bias$", "belongs to the gate inside attention"),
    ),
    feeds=pre_norms(mlp=r"re:.*\.pre_feedforward_layernorm$"),
    notes="norms before and after attention and MLP; a gate between values and output",
)

AFMOE = BEAM.replace(
    mlp_in=(
        r"re:.*mlp\.(gate|up)_proj$",
        r"re:.*mlp\.router\.gate$",
        r"re:.*mlp\.experts\.gate_up_proj$",
        r"re:.*mlp\.shared_experts\.(gate|up)_proj$",
    ),
    post_norm=(r"re:.*\.post_(attention|mlp)_layernorm$",),
    ignore=(QUERY_KEY_NORMS, Untouched(r"re:.*mlp\.expert_bias$", "biases the router")),
    feeds=pre_norms(mlp=r"re:.*\.pre_mlp_layernorm$"),
)

PARALLEL = MOE.replace(
    ignore=(),
    feeds=parallel(INPUT_NORM),
    notes="one norm feeds attention and experts",
)

PARALLEL_LAYERNORM = PARALLEL.replace(
    kind="layer",
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
    refuses={"R1": "the output of each norm is added to the stream, and its scale is no rotation"},
    notes="linear attention in most layers",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "mixtral": ROUTED,
    "olmoe": (
        ROUTED.replace(when={"clip_qkv": None}),
        ROUTED.replace(attn_gated=True, notes=CLIPPED),
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
    "laguna": (LAGUNA, LAGUNA.replace(when={"gating": "per-head"}), LAGUNA_ELEMENTS),
    "ernie4_5_moe": ERNIE,
    "gpt_oss": GPT_OSS,
    "phimoe": PHIMOE,
    "llama4_text": LLAMA4,
    "hunyuan_v1_moe": HUNYUAN,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "granitemoe_swa": GRANITE.replace(ignore=(SINKS,)),
    "flex_olmo": FLEX_OLMO,
    "afmoe": AFMOE,
    "minimax": MINIMAX,
    "cohere2_moe": (PARALLEL_LAYERNORM, PARALLEL),
}
