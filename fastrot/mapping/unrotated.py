"""Decoders whose residual stream no rotation can pass: R1 is refused, the rest acts inside blocks.

What refuses it is of two kinds: something multiplies the stream channel by channel, D h, and
D Q = Q D holds for all diagonal D only where Q is diagonal too; or something reads the stream
beside something else, in a vector of another size.
"""

from fastrot.mapping.dense import LLAMA
from fastrot.mapping.hybrid import KIMI
from fastrot.mapping.latent import KV_A, KV_B, LATENT, LATENT_NORM
from fastrot.mapping.layernorm import GPT2, OWN_ATTENTION
from fastrot.mapping.roles import Architecture, Mapping

OPENAI_GPT = Architecture(
    Mapping(mlp_out=GPT2.mapping.mlp_out),
    refuses={
        "R1": "the output of its norms is the residual stream, and their scale no rotation",
        "R2": "neither its attention nor its configuration says how large a head is",
        "R3": OWN_ATTENTION,
    },
    notes="norms behind the sums",
)

INSIDE = Architecture(
    Mapping(
        attn=LLAMA.mapping.attn,
        attn_v=LLAMA.mapping.attn_v,
        attn_o=LLAMA.mapping.attn_o,
        mlp_out=LLAMA.mapping.mlp_out,
    )
)
"""The places of R2, R3 and R4 in a decoder with the names of Llama's."""

DOGE = INSIDE.replace(
    attn_gated=True,
    when={"is_moe": False},
    refuses={"R1": "each layer scales the stream channel by channel before it adds to it"},
    notes="the mask is made of the values",
)

DORY = INSIDE.replace(
    attn_gated=True,
    refuses={"R1": "each layer moves the stream at a rate of its own for every channel"},
    notes="a gate between values and output",
)

LONGCAT_B = (r"re:.*self_attn\.\d+\.kv_b_proj$",)

LONGCAT = INSIDE.replace(
    attn=("LongcatFlashMLA",),
    attn_v=LONGCAT_B,
    attn_v_rows="latent",
    latent_writers=(r"re:.*self_attn\.\d+\.kv_a_proj_with_mqa$",),
    latent_readers=LONGCAT_B,
    attn_o=(r"re:.*self_attn\.\d+\.o_proj$",),
    mlp_out=(r"re:.*mlps\.\d+\.down_proj$",),
    feeds={r"re:.*self_attn\.\d+\.kv_a_layernorm$": "latent_readers"},
    refuses={
        "R1": "its identity experts add the output of a norm to the stream, and its scale is no "
        "rotation",
    },
    notes="R2 on the value rows of kv_b_proj; R4 in dense MLPs, not in experts",
)

ZAMBA = Architecture(
    Mapping(
        attn=(r"re:.*shared_transf\.self_attn$",),
        attn_v=(r"re:.*shared_transf\.self_attn\.v_proj$",),
        attn_o=(r"re:.*shared_transf\.self_attn\.o_proj$",),
        mlp_out=(r"re:.*shared_transf\.feed_forward\.down_proj$",),
    ),
    refuses={
        "R1": "its attention reads the stream and the embedding side by side, twice as wide as the "
        "stream, through one norm"
    },
    notes="Mamba layers; attention and MLP are shared",
)

HYPER = INSIDE.replace(
    attn_v=(),
    attn_gated=True,
    latent_writers=KV_A,
    latent_readers=KV_B,
    mlp_out=(r"re:.*mlp\.((shared_)?experts\.)?down_proj$",),
    feeds={LATENT_NORM: "latent_readers"},
    refuses={"R1": "its connections read several streams side by side, in one vector"},
    notes="latent attention, with a gate between values and output",
)

ZAYA = INSIDE.replace(
    attn_v=(),
    attn_gated=True,
    mlp_out=(r"re:.*mlp\.experts\.down_proj$",),
    refuses={"R1": "each sum scales the stream channel by channel"},
    notes="half of the values come from the token before",
)

INKLING = INSIDE.replace(
    attn_v=(),
    attn_gated=True,
    mlp_out=(r"re:.*mlp\.experts\.down_proj$",),
    refuses={"R1": "a convolution with a filter for every channel stands before each sum"},
    notes="values pass a convolution",
)

SINES = "it adds sines to the stream that are no parameter, so that nothing can turn them too"

CTRL = Architecture(
    Mapping(
        attn=(r"re:.*\.multi_head_attention$",),
        attn_v=(r"re:.*\.multi_head_attention\.Wv$",),
        attn_o=(r"re:.*\.multi_head_attention\.dense$",),
    ),
    refuses={
        "R1": SINES,
        "R4": "its MLP is a list of modules, none of which is called by a name that R4 could hold",
    },
    notes="positions are sines",
)

XGLM = INSIDE.replace(
    attn_o=(r"re:.*self_attn\.out_proj$",),
    mlp_out=(r"re:.*\.fc2$",),
    refuses={"R1": SINES, "R3": OWN_ATTENTION},
    notes="positions are sines",
)

KOSMOS = Architecture(
    Mapping(
        attn=(r"re:text_model\..*self_attn$",),
        attn_o=(r"re:text_model\..*self_attn\.out_proj$",),
        mlp_out=(r"re:text_model\..*\.fc2$",),
    ),
    refuses={"R1": SINES, "R2": "a norm that centres stands between values and output"},
    notes="positions are sines; norms inside attention and MLP",
)

KOSMOS2_5 = KOSMOS.replace(
    attn_v=(r"re:text_model\..*self_attn\.v_proj$",),
    refuses={"R1": SINES},
    notes="positions are sines; a norm inside the MLP",
)

RWKV = Architecture(
    Mapping(mlp_out=(r"re:.*\.feed_forward\.value$",)),
    refuses={
        "R1": "it mixes each token with the one before at a rate of its own for every channel"
    },
    notes="no attention",
)

AXK2 = HYPER.replace(
    refuses={
        **HYPER.refuses,
        "R1": "a gate multiplies the output of its norms channel by channel before it is read",
    }
)

DEEPSEEK_V4 = Architecture(
    Mapping(mlp_out=(r"re:.*mlp\.(shared_)?experts\.down_proj$",)),
    refuses={
        "R1": HYPER.refuses["R1"],
        "R2": "its keys are its values, positions turn both, and queries take no part in R2",
        "R3": "its keys are its values, and a rotation of the one is one of the other",
    },
    notes="keys are values, and are compressed",
)

ZAMBA2 = ZAMBA.replace(
    mapping=Mapping(
        attn=(r"re:.*shared_transformer\.self_attn$",),
        attn_v=(r"re:.*shared_transformer\.self_attn\.v_proj$",),
        attn_o=(r"re:.*shared_transformer\.self_attn\.o_proj$",),
        mlp_out=(r"re:.*shared_transformer\.feed_forward\.down_proj$",),
    ),
    when={"use_shared_attention_adapter": False},
)

ZAMBA2_ADAPTED = ZAMBA2.replace(
    attn_v=(),
    attn_gated=True,
    when={"use_shared_attention_adapter": True},
    notes="Mamba layers; attention and MLP are shared; each layer adds to the values",
)

INKLING2 = INKLING.replace(attn_o=(r"re:.*self_attn\.o_proj\.linear$",))

GLM5_NEXT = HYPER.replace(
    attn_o=(),
    attn_gated=False,
    refuses={**HYPER.refuses, **KIMI.refuses},
    notes="linear attention and multi-head latent attention",
)

MISTRAL_LARGE4 = INSIDE.replace(
    attn_v=LATENT.mapping.attn_v,
    attn_v_rows="latent",
    mlp_out=HYPER.mapping.mlp_out,
    refuses={
        "R1": "its indexer reads the scaled output of a norm through a second one, which centres",
        "R3": "some layers use the latents of others, and no norm of their own stands before them",
    },
    notes="R2 on the value rows of kv_b_proj",
)

MUSE_SPARK = INSIDE.replace(
    attn_v=(),
    attn_gated=True,
    refuses={"R1": "each sum scales the stream channel by channel"},
    notes="a gate between values and output; R4 in dense MLPs, not in experts",
)

QWEN4 = INSIDE.replace(
    attn_v=(),
    attn_gated=True,
    mlp_out=(r"re:.*mlp\.(shared_expert|experts)\.down_proj$",),
    refuses={"R1": HYPER.refuses["R1"]},
    notes="linear attention; q_proj carries a gate between values and output",
)

BLT = INSIDE.replace(
    refuses={
        "R1": "bytes become a patch by the largest value of each channel of the stream",
        "R2": "its parts differ in the size of their heads, and R2 is one rotation for all",
    },
    notes="reads bytes, and groups them into patches",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "openai-gpt": OPENAI_GPT,
    "blt": BLT,
    "doge": DOGE,
    "dory": DORY,
    "longcat_flash": LONGCAT,
    "zamba": ZAMBA,
    "hy_v4_vl_text": HYPER,
    "inkling2_text": INKLING2,
    "inkling2_loop_text": INKLING2,
    "glm5_next_text": GLM5_NEXT,
    "mistral_large4_text": MISTRAL_LARGE4,
    "muse_spark_text": MUSE_SPARK,
    "qwen4_exp_text": QWEN4,
    "zamba2": (ZAMBA2, ZAMBA2_ADAPTED),
    "ctrl": CTRL,
    "xglm": XGLM,
    "kosmos-2": KOSMOS,
    "kosmos-2.5": KOSMOS2_5,
    "rwkv": RWKV,
    "axk2": AXK2,
    "deepseek_v4": DEEPSEEK_V4,
    "hy_v4": HYPER,
    "zaya": ZAYA,
    "inkling_text": INKLING,
}
