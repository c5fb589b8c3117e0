"""Decoders in which not every block is attention: state-space and linear-attention layers.

R2 and R3 act on their attention layers, R4 on their MLPs and experts. R4 leaves the output
projection of Mamba layers alone: in training transformers hands its weight to a fused kernel, so
that nothing can act on its input.
"""

from fastrot.mapping.dense import LLAMA, parallel, pre_norms
from fastrot.mapping.experts import GRANITE, HEAD_GATE, MOE, QUERY_KEY_NORMS
from fastrot.mapping.latent import LATENT, LATENT_INSIDE
from fastrot.mapping.roles import Architecture, Mapping, Untouched

DELTA = MOE.replace(
    attn_gated=True,
    readers=(r"re:.*linear_attn\.in_proj_\w+$",),
    writers=(r"re:.*linear_attn\.out_proj$",),
    ignore=(
        QUERY_KEY_NORMS,
        Untouched(
            r"re:.*linear_attn\.(A_log|dt_bias|conv1d\.weight|norm\.weight)$",
            "acts inside linear attention",
        ),
    ),
    offset=1.0,
    notes="q_proj carries a gate between values and output",
)

LARA_MINI = DELTA.replace(attn_gated=False, offset=0.0, notes="linear attention")

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
    {r"re:.*layers\.\d+\.norm$": "readers", r"re:.*\.norm_f$": "lm_head"},
    refuses={
        "R4": "in training transformers hands the weight of out_proj to a fused kernel, so that "
        "nothing can act on its input"
    },
    notes="no attention",
)

NEMOTRON_IN = (
    r"re:.*\.mixer\.up_proj$",
    r"re:.*\.mixer\.gate$",
    r"re:.*\.mixer\.shared_experts\.up_proj$",
)

NEMOTRON_H = MAMBA.replace(
    attn=("NemotronHAttention",),
    attn_q=(r"re:.*\.mixer\.q_proj$",),
    attn_k=(r"re:.*\.mixer\.k_proj$",),
    attn_v=(r"re:.*\.mixer\.v_proj$",),
    attn_o=(r"re:.*\.mixer\.o_proj$",),
    mlp_in=(*NEMOTRON_IN, r"re:.*\.mixer\.experts\.up_proj$"),
    mlp_out=(r"re:.*\.mixer\.((shared_)?experts\.)?down_proj$",),
    feeds=parallel(r"re:.*layers\.\d+\.norm$", r"re:.*\.norm_f$"),
    when={"moe_latent_size": None},
    refuses={},
    notes="each layer is one of Mamba, attention, MLP and experts; no gates",
)

NEMOTRON_H_LATENT = NEMOTRON_H.replace(
    mlp_in=NEMOTRON_IN,
    mlp_out=(r"re:.*\.mixer\.(shared_experts\.)?down_proj$",),
    readers=(*MAMBA.mapping.readers, r"re:.*\.mixer\.fc1_latent_proj$"),
    writers=(*MAMBA.mapping.writers, r"re:.*\.mixer\.fc2_latent_proj$"),
    ignore=(
        MIXER_INSIDE,
        Untouched(r"re:.*\.mixer\.experts\.(up|down)_proj$", "works in the experts' latent"),
    ),
    when={},
    refuses={"R4": "its experts write a latent of their own, not the stream"},
    notes="experts work in a latent",
)

SCAN = LLAMA.replace(
    mlp_in=(
        r"re:.*feed_forward\.(gate|up)_proj$",
        r"re:.*feed_forward\.router$",
        r"re:.*feed_forward\.experts\.gate_up_proj$",
    ),
    mlp_out=(r"re:.*feed_forward\.(experts\.)?down_proj$",),
    readers=(r"re:.*\.mamba\.in_proj$",),
    writers=(r"re:.*\.mamba\.out_proj$",),
    ignore=(MIXER_INSIDE,),
    feeds=pre_norms(mlp=r"re:.*\.pre_ff_layernorm$", last=r"re:.*model\.final_layernorm$"),
    notes="Mamba layers, or Mamba beside attention",
)

GRANITE_HYBRID = GRANITE.replace(
    readers=SCAN.mapping.readers,
    writers=SCAN.mapping.writers,
    ignore=(MIXER_INSIDE,),
    notes="Mamba layers; scalar multipliers, which commute with rotations",
)

LFM2 = LLAMA.replace(
    attn_o=(r"re:.*self_attn\.out_proj$",),
    mlp_in=(
        r"re:.*feed_forward\.w[13]$",
        r"re:.*feed_forward\.gate$",
        r"re:.*feed_forward\.experts\.gate_up_proj$",
    ),
    mlp_out=(r"re:.*feed_forward\.w2$", r"re:.*feed_forward\.experts\.down_proj$"),
    readers=(r"re:.*\.conv\.in_proj$",),
    writers=(r"re:.*\.conv\.out_proj$",),
    ignore=(
        QUERY_KEY_NORMS,
        Untouched(r"re:.*\.conv\.conv\.\w+$", "acts inside the convolution layer"),
    ),
    feeds=pre_norms(r"re:.*\.operator_norm$", r"re:.*\.ffn_norm$", r"re:.*model\.embedding_norm$"),
    notes="convolution layers; the last norm is called embedding_norm",
)

LFM3 = LFM2.replace(
    attn_o=LLAMA.mapping.attn_o,
    mlp_in=LFM2.mapping.mlp_in[:1],
    mlp_out=LFM2.mapping.mlp_out[:1],
    readers=(*LFM2.mapping.readers, HEAD_GATE),
    when={"use_sandwich_norm": False},
    notes="convolution layers; each head has a gate; the last norm is called embedding_norm",
)

LFM3_SANDWICH = LFM3.replace(
    post_norm=(r"re:.*\.post_(operator|ffn)_norm$",),
    post_norm_in=(*LFM3.mapping.attn_o, *LFM3.mapping.mlp_out, *LFM3.mapping.writers),
    when={"use_sandwich_norm": True},
)

RECURRENT_GEMMA = Architecture(
    Mapping(
        embedding=LLAMA.mapping.embedding,
        attn=("RecurrentGemmaAttention",),
        attn_q=(r"re:.*temporal_block\.q_proj$",),
        attn_k=(r"re:.*temporal_block\.k_proj$",),
        attn_v=(r"re:.*temporal_block\.v_proj$",),
        attn_o=(r"re:.*temporal_block\.o_proj$",),
        mlp_in=(r"re:.*mlp_block\.(gate|up)_proj$",),
        mlp_out=(r"re:.*mlp_block\.down_proj$",),
        lm_head=("lm_head",),
        readers=(r"re:.*temporal_block\.linear_[xy]$",),
        writers=(r"re:.*temporal_block\.linear_out$",),
        ignore=(
            Untouched(
                r"re:.*temporal_block\.(conv_1d|rg_lru)\.\w+$", "acts inside the recurrent block"
            ),
        ),
    ),
    pre_norms(
        r"re:.*\.temporal_pre_norm$", r"re:.*\.channel_pre_norm$", r"re:.*model\.final_norm$"
    ),
    offset=1.0,
    notes="scaled embedding",
)

KIMI = LATENT.replace(
    attn_k=(r"re:.*self_attn\.(k_proj|v_proj|kv_a_proj_with_mqa)$",),
    attn_v=(),
    attn_v_rows="all",
    readers=(r"re:.*self_attn\.(b_proj|g_a_proj|forget_gate\.f_a_proj)$",),
    ignore=(
        LATENT_INSIDE,
        Untouched(
            r"re:.*self_attn\.(g_b_proj|conv1d|o_norm|forget_gate\.f_b_proj)\.weight$",
            "acts inside linear attention",
        ),
        Untouched(r"re:.*self_attn\.forget_gate\.(A_log|dt_bias)$", "acts inside linear attention"),
    ),
    refuses={
        "R2": "its linear attention has the same names as its attention, and norms over the values",
    },
    notes="linear attention and multi-head latent attention",
)

BAILING = KIMI.replace(
    readers=(r"re:.*self_attn\.(b_proj|g_proj|forget_gate\.f_proj)$",),
    ignore=(
        LATENT_INSIDE,
        Untouched(
            r"re:.*self_attn\.(conv1d\.weight|o_norm\.weight|forget_gate\.(A_log|dt_bias))$",
            "acts inside linear attention",
        ),
    ),
)

OLMO_HYBRID = LLAMA.replace(
    feeds={},
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
