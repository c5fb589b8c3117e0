"""Multi-head latent attention: keys and values are made from a latent, and the latent is cached."""

from fastrot.mapping.dense import INPUT_NORM, LAST_NORM, MLP_NORM
from fastrot.mapping.experts import MOE
from fastrot.mapping.roles import Architecture, Untouched

LATENT_INSIDE = Untouched(
    r"re:.*self_attn\.(q_a_layernorm|q_b_proj)\.weight$",
    "acts on a latent, not on the stream",
)

KV_A = (r"re:.*self_attn\.kv_a_proj_with_mqa$",)
KV_B = (r"re:.*self_attn\.kv_b_proj$",)
LATENT_NORM = r"re:.*self_attn\.kv_a_layernorm$"
"""What writes the latent that is cached, what reads it, and the norm between them."""

LATENT = MOE.replace(
    attn_q=(r"re:.*self_attn\.(q_proj|q_a_proj)$",),
    attn_k=KV_A,
    attn_v=KV_B,
    attn_v_rows="latent",
    latent_writers=KV_A,
    latent_readers=KV_B,
    ignore=(LATENT_INSIDE,),
    feeds={
        INPUT_NORM: ("attn_q", "attn_k", "readers"),
        LATENT_NORM: "latent_readers",
        MLP_NORM: "mlp_in",
        LAST_NORM: "lm_head",
    },
    notes="R2 on the value rows of kv_b_proj",
)

INDEXER_IN = r"re:.*self_attn\.indexer\.(wk|weights_proj)$"

SPARSE = LATENT.replace(
    readers=(INDEXER_IN,),
    ignore=(
        LATENT_INSIDE,
        Untouched(
            r"re:.*self_attn\.indexer\.(wq_b|k_norm)\.\w+$",
            "acts inside the indexer, which chooses the keys that are seen",
        ),
    ),
    notes="as DeepSeek-V3, and the indexer reads the stream too",
)

AXK1 = LATENT.replace(
    post_norm=(r"re:.*mlp\.post_mlp_layernorm$",),
    post_norm_in=(r"re:.*mlp\.(shared_)?experts\.down_proj$",),
    notes="as DeepSeek-V3, and a norm behind the experts",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "mistral4": LATENT,
    "glm4_moe_lite": LATENT,
    "deepseek_v32": SPARSE,
    "glm_moe_dsa": SPARSE,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "sarvam_mla": LATENT,
    "axk1": AXK1,
}
