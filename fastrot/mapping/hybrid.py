"""Decoders in which not every block is attention: state-space and linear-attention layers.

R2 and R3 act on their attention layers, R4 on their MLPs and experts. R4 leaves the output
projection of Mamba layers alone: in training transformers hands its weight to a fused kernel, so
that nothing can act on its input.
"""

from dataclasses import replace

from fastrot.mapping.dense import LLAMA
from fastrot.mapping.experts import (
    GRANITE,
    GRANITE_IN,
    HEAD_GATE,
    MLP_IN,
    MOE,
    QKV,
    QUERY_KEY_NORMS,
)
from fastrot.mapping.latent import LATENT, LATENT_IN, LATENT_INSIDE
from fastrot.mapping.roles import Architecture, Mapping, NormMapping, Untouched

DELTA_IN = r"re:.*linear_attn\.in_proj_\w+$"

DELTA = Architecture(
    replace(
        MOE.mapping,
        attn_gated=True,
        readers=(DELTA_IN,),
        writers=(r"re:.*linear_attn\.out_proj$",),
        ignore=(
            QUERY_KEY_NORMS,
            Untouched(
                r"re:.*linear_attn\.(A_log|dt_bias|conv1d\.weight|norm\.weight)$",
                "acts inside linear attention",
            ),
        ),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, DELTA_IN), offset=1.0),
        NormMapping(r"re:.*\.post_attention_layernorm$", MLP_IN, offset=1.0),
        NormMapping(r"re:.*model\.norm$", ("lm_head",), offset=1.0),
    ),
    notes="q_proj carries a gate between values and output",
)

LARA_MINI = replace(
    DELTA,
    mapping=replace(DELTA.mapping, attn_gated=False),
    norms=tuple(replace(norm, offset=0.0) for norm in DELTA.norms),
    notes="linear attention",
)

MIXER_INSIDE = Untouched(
    r"re:.*\.(mixer|mamba)\.(A_log|D|dt_bias|(conv1d|norm|x_proj|dt_proj|\w+_layernorm)\.\w+)$",
    "acts inside the state-space layer",
)

MAMBA = Architecture(
    Mapping(
        embedding=(r"re:.*\.embeddings$",),
        readers=(r"re:.*\.mixer\.in_proj$",),
        writers=(r"re:.*\.mixer\.out_proj$",),
        lm_head=("lm_head",),
        ignore=(MIXER_INSIDE,),
    ),
    (
        NormMapping(r"re:.*layers\.\d+\.norm$", (r"re:.*\.mixer\.in_proj$",)),
        NormMapping(r"re:.*\.norm_f$", ("lm_head",)),
    ),
    refuses={
        "R4": "in training transformers hands the weight of out_proj to a fused kernel, so that "
        "nothing can act on its input"
    },
    notes="no attention",
)

NEMOTRON_IN = (
    r"re:.*\.mixer\.(in|q|k|v|up)_proj$",
    r"re:.*\.mixer\.gate$",
    r"re:.*\.mixer\.shared_experts\.up_proj$",
)
NEMOTRON_EXPERTS = r"re:.*\.mixer\.experts\.up_proj$"

NEMOTRON_H = Architecture(
    replace(
        MAMBA.mapping,
        attn=("NemotronHAttention",),
        attn_q=(r"re:.*\.mixer\.q_proj$",),
        attn_k=(r"re:.*\.mixer\.k_proj$",),
        attn_v=(r"re:.*\.mixer\.v_proj$",),
        attn_o=(r"re:.*\.mixer\.o_proj$",),
        mlp_in=(
            r"re:.*\.mixer\.up_proj$",
            r"re:.*\.mixer\.gate$",
            r"re:.*\.mixer\.shared_experts\.up_proj$",
            NEMOTRON_EXPERTS,
        ),
        mlp_out=(r"re:.*\.mixer\.((shared_)?experts\.)?down_proj$",),
    ),
    (
        NormMapping(r"re:.*layers\.\d+\.norm$", (*NEMOTRON_IN, NEMOTRON_EXPERTS)),
        NormMapping(r"re:.*\.norm_f$", ("lm_head",)),
    ),
    when={"moe_latent_size": None},
    notes="each layer is one of Mamba, attention, MLP and experts; no gates",
)

NEMOTRON_H_LATENT = Architecture(
    replace(
        NEMOTRON_H.mapping,
        mlp_in=NEMOTRON_H.mapping.mlp_in[:-1],
        mlp_out=(r"re:.*\.mixer\.(shared_experts\.)?down_proj$",),
        readers=(*MAMBA.mapping.readers, r"re:.*\.mixer\.fc1_latent_proj$"),
        writers=(*MAMBA.mapping.writers, r"re:.*\.mixer\.fc2_latent_proj$"),
        ignore=(
            MIXER_INSIDE,
            Untouched(r"re:.*\.mixer\.experts\.(up|down)_proj$", "works in the experts' latent"),
        ),
    ),
    (
        NormMapping(r"re:.*layers\.\d+\.norm$", (*NEMOTRON_IN, r"re:.*\.mixer\.fc1_latent_proj$")),
        NEMOTRON_H.norms[1],
    ),
    refuses={"R4": "its experts write a latent of their own, not the stream"},
    notes="experts work in a latent",
)

SCAN_IN = (
    r"re:.*feed_forward\.(gate|up)_proj$",
    r"re:.*feed_forward\.router$",
    r"re:.*feed_forward\.experts\.gate_up_proj$",
)

SCAN = Architecture(
    replace(
        LLAMA.mapping,
        mlp_in=SCAN_IN,
        mlp_out=(r"re:.*feed_forward\.(experts\.)?down_proj$",),
        readers=(r"re:.*\.mamba\.in_proj$",),
        writers=(r"re:.*\.mamba\.out_proj$",),
        ignore=(MIXER_INSIDE,),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, r"re:.*\.mamba\.in_proj$")),
        NormMapping(r"re:.*\.pre_ff_layernorm$", SCAN_IN),
        NormMapping(r"re:.*model\.final_layernorm$", ("lm_head",)),
    ),
    notes="Mamba layers, or Mamba beside attention",
)

GRANITE_HYBRID = replace(
    GRANITE,
    mapping=replace(
        GRANITE.mapping,
        readers=(r"re:.*\.mamba\.in_proj$",),
        writers=(r"re:.*\.mamba\.out_proj$",),
        ignore=(MIXER_INSIDE,),
    ),
    norms=(
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, r"re:.*\.mamba\.in_proj$")),
        NormMapping(r"re:.*\.post_attention_layernorm$", GRANITE_IN),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    ),
    notes="Mamba layers; scalar multipliers, which commute with rotations",
)

LFM2_IN = (
    r"re:.*feed_forward\.w[13]$",
    r"re:.*feed_forward\.gate$",
    r"re:.*feed_forward\.experts\.gate_up_proj$",
)

LFM2 = Architecture(
    replace(
        LLAMA.mapping,
        attn_o=(r"re:.*self_attn\.out_proj$",),
        mlp_in=LFM2_IN,
        mlp_out=(r"re:.*feed_forward\.w2$", r"re:.*feed_forward\.experts\.down_proj$"),
        readers=(r"re:.*\.conv\.in_proj$",),
        writers=(r"re:.*\.conv\.out_proj$",),
        ignore=(
            QUERY_KEY_NORMS,
            Untouched(r"re:.*\.conv\.conv\.\w+$", "acts inside the convolution layer"),
        ),
    ),
    (
        NormMapping(r"re:.*\.operator_norm$", (*QKV, r"re:.*\.conv\.in_proj$")),
        NormMapping(r"re:.*\.ffn_norm$", LFM2_IN),
        NormMapping(r"re:.*model\.embedding_norm$", ("lm_head",)),
    ),
    notes="convolution layers; the last norm is called embedding_norm",
)

LFM3 = replace(
    LFM2,
    mapping=replace(
        LFM2.mapping,
        attn_o=LLAMA.mapping.attn_o,
        mlp_in=LFM2_IN[:1],
        mlp_out=LFM2.mapping.mlp_out[:1],
        readers=(*LFM2.mapping.readers, HEAD_GATE),
    ),
    norms=(
        NormMapping(r"re:.*\.operator_norm$", (*QKV, HEAD_GATE, r"re:.*\.conv\.in_proj$")),
        NormMapping(r"re:.*\.ffn_norm$", LFM2_IN[:1]),
        LFM2.norms[2],
    ),
    when={"use_sandwich_norm": False},
    notes="convolution layers; each head has a gate; the last norm is called embedding_norm",
)

LFM3_SANDWICH = replace(
    LFM3,
    mapping=replace(
        LFM3.mapping,
        post_norm=(r"re:.*\.post_(operator|ffn)_norm$",),
        post_norm_in=(*LFM3.mapping.attn_o, *LFM3.mapping.mlp_out, *LFM3.mapping.writers),
    ),
    when={"use_sandwich_norm": True},
)

RECURRENT_IN = r"re:.*temporal_block\.linear_[xy]$"
TEMPORAL_QKV = r"re:.*temporal_block\.[qkv]_proj$"
BLOCK_IN = r"re:.*mlp_block\.(gate|up)_proj$"

RECURRENT_GEMMA = Architecture(
    Mapping(
        embedding=LLAMA.mapping.embedding,
        attn=("RecurrentGemmaAttention",),
        attn_q=(r"re:.*temporal_block\.q_proj$",),
        attn_k=(r"re:.*temporal_block\.k_proj$",),
        attn_v=(r"re:.*temporal_block\.v_proj$",),
        attn_o=(r"re:.*temporal_block\.o_proj$",),
        mlp_in=(BLOCK_IN,),
        mlp_out=(r"re:.*mlp_block\.down_proj$",),
        lm_head=("lm_head",),
        readers=(RECURRENT_IN,),
        writers=(r"re:.*temporal_block\.linear_out$",),
        ignore=(
            Untouched(
                r"re:.*temporal_block\.(conv_1d|rg_lru)\.\w+$", "acts inside the recurrent block"
            ),
        ),
    ),
    (
        NormMapping(r"re:.*\.temporal_pre_norm$", (TEMPORAL_QKV, RECURRENT_IN), offset=1.0),
        NormMapping(r"re:.*\.channel_pre_norm$", (BLOCK_IN,), offset=1.0),
        NormMapping(r"re:.*model\.final_norm$", ("lm_head",), offset=1.0),
    ),
    notes="scaled embedding",
)

KIMI_IN = r"re:.*self_attn\.(b_proj|g_a_proj|forget_gate\.f_a_proj)$"

KIMI = Architecture(
    replace(
        LATENT.mapping,
        attn_q=(r"re:.*self_attn\.(q_proj|q_a_proj)$",),
        attn_k=(r"re:.*self_attn\.(k_proj|v_proj|kv_a_proj_with_mqa)$",),
        attn_v=(),
        attn_v_rows="all",
        readers=(KIMI_IN,),
        ignore=(
            LATENT_INSIDE,
            Untouched(
                r"re:.*self_attn\.(g_b_proj|conv1d|o_norm|forget_gate\.f_b_proj)\.weight$",
                "acts inside linear attention",
            ),
            Untouched(
                r"re:.*self_attn\.forget_gate\.(A_log|dt_bias)$", "acts inside linear attention"
            ),
        ),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, *LATENT_IN, KIMI_IN)),
        *LATENT.norms[1:],
    ),
    refuses={
        "R2": "its linear attention has the same names as its attention, and norms over the values",
    },
    notes="linear attention and multi-head latent attention",
)

BAILING_IN = r"re:.*self_attn\.(b_proj|g_proj|forget_gate\.f_proj)$"

BAILING = replace(
    KIMI,
    mapping=replace(
        KIMI.mapping,
        readers=(BAILING_IN,),
        ignore=(
            LATENT_INSIDE,
            Untouched(
                r"re:.*self_attn\.(conv1d\.weight|o_norm\.weight|forget_gate\.(A_log|dt_bias))$",
                "acts inside linear attention",
            ),
        ),
    ),
    norms=(
        NormMapping(r"re:.*\.input_layernorm$", (*QKV, *LATENT_IN, BAILING_IN)),
        *LATENT.norms[1:],
    ),
)

OLMO_HYBRID = replace(
    LLAMA,
    norms=(),
    refuses={
        "R1": "post_attention_layernorm stands after attention in attention layers and before the "
        "MLP in the others, which fastrot's table can't tell apart"
    },
    notes="linear attention with norms before, attention with norms after",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA,
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "falcon_mamba": MAMBA,
    "nemotron_h": (NEMOTRON_H, NEMOTRON_H_LATENT),
    "bamba": SCAN,
    "falcon_h1": SCAN,
    "jamba": SCAN,
    "granitemoehybrid": GRANITE_HYBRID,
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "lfm3": (LFM3_SANDWICH, LFM3),
    "lara_mini": LARA_MINI,
    "recurrent_gemma": RECURRENT_GEMMA,
    "kimi_linear": KIMI,
    "bailing_hybrid": BAILING,
    "olmo_hybrid": OLMO_HYBRID,
}
