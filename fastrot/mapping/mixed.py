"""Models that see, hear or read proteins, around language models of a shape of their own."""

from fastrot.mapping.dense import GRANITE, PHI3, QWEN3
from fastrot.mapping.experts import MOE
from fastrot.mapping.roles import Architecture, Shell, Untouched
from fastrot.mapping.sight import BEFORE_LAST, UNROTATED
from fastrot.mapping.vision import QWEN3_VL, TOWER

APERTUS1P5 = Shell(
    "model.language_model",
    ignore=(
        Untouched(
            r"re:model\.(vision|audio)_tokenizer\.", "turns a picture or a sound into token ids"
        ),
    ),
    notes="images and sounds are tokens",
)

ARIA = Shell(
    "model.language_model",
    writers=(r"re:model\.multi_modal_projector\.feed_forward\.linear_out$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.multi_modal_projector\."
            r"(query$|cross_attn\.|layer_norm\.|feed_forward\.linear_in\.)",
            BEFORE_LAST,
        ),
    ),
)

ARIA_TEXT = MOE.replace(
    mlp_in=(
        r"re:.*mlp\.router$",
        r"re:.*mlp\.experts\.gate_up_proj$",
        r"re:.*mlp\.shared_experts\.(gate|up)_proj$",
    ),
    mlp_out=(r"re:.*mlp\.(shared_)?experts\.down_proj$",),
    ignore=(),
    notes="experts are (in, out); the router reads the stream too",
)

ERNIE = Shell(
    "model.language_model",
    post_norm=(r"re:model\.resampler_model\.after_norm$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.resampler_model\.(spatial_linear|temporal_linear|mlp)\.",
            "stands before the norm at the end of the resampler",
        ),
    ),
    notes="the resampler ends in a norm",
)

ERNIE_TEXT = MOE.replace(
    mlp_in=(
        r"re:.*mlp\.(shared_experts\.)?(gate|up)_proj$",
        r"re:.*mlp\.(text|vision)_moe\.gate$",
        r"re:.*mlp\.(text|vision)_moe\.experts\.gate_up_proj$",
    ),
    mlp_out=(r"re:.*mlp\.((shared_experts|(text|vision)_moe\.experts)\.)?down_proj$",),
    ignore=(Untouched(r"re:.*moe_statics\.e_score_correction_bias$", "biases the router"),),
    notes="text and images have experts of their own; bias of the router's choice is a parameter",
)

NEMOTRON = Shell(
    "language_model.model",
    writers=(r"re:(multi_modal_projector|embed_audio)\.linear_2$",),
    ignore=(
        TOWER,
        Untouched(r"re:vision_final_layernorm\.", "sees the image and ends in the projector"),
        Untouched(r"re:(multi_modal_projector|embed_audio)\.(layer_norm|linear_1)\.", BEFORE_LAST),
    ),
    head="language_model.lm_head",
)

PHI4 = PHI3.replace(
    embedding=(r"re:model\.embed_tokens$",),
    attn=(r"re:model\.layers\.\d+\.self_attn$",),
    attn_o=(r"re:model\.layers\.\d+\.self_attn\.o_proj$",),
    mlp_in=(r"re:model\.layers\.\d+\.mlp\.gate_up_proj$",),
    mlp_out=(r"re:model\.layers\.\d+\.mlp\.down_proj$",),
    writers=(
        r"re:.*image_embed\.img_projection_down$",
        r"re:.*audio_embed\.down_proj_for_(vision_)?speech$",
    ),
    ignore=(
        Untouched(
            r"re:.*image_embed\.(img_processor\.|img_projection_up\.|\w+_img_feature_extensor$)",
            BEFORE_LAST,
        ),
        Untouched(r"re:.*audio_embed\.(encoder|up_proj_for_(vision_)?speech)\.", BEFORE_LAST),
    ),
    notes="one matrix [gate, up]; it sees and hears",
)

GRANITE_PROJECTORS = (r"re:model\.(layerwise|spatial)_projectors\.\d+\.out_linear$",)

GRANITE_VISION = Shell(
    "model.language_model",
    writers=(*GRANITE_PROJECTORS, r"re:model\.image_newline$"),
    throughout=(*GRANITE_PROJECTORS, r"re:model\.image_newline$"),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.(layerwise|spatial)_projectors\.\d+\.(query|image_positions|norm|qformer)\b",
            BEFORE_LAST,
        ),
    ),
    notes="each of its projectors writes before a layer of its own, and a learned vector at the "
    "end of each image line does",
)

HUNYUAN = Shell(
    "model.language_model",
    post_norm=(r"re:model\.vision_tower\.patch_merger\.after_rms$",),
    ignore=(TOWER,),
    notes="the tower ends in a norm",
)

JANUS = Shell(
    "model.language_model",
    writers=(r"re:model\.(generation_)?aligner\.hidden_layers\.0$",),
    readers=(r"re:model\.generation_head\.proj_out$",),
    ignore=(
        TOWER,
        Untouched(r"re:model\.(generation_)?aligner\.fc1\.", BEFORE_LAST),
        Untouched(r"re:model\.vqmodel\.", "turns a picture into token ids, and back"),
        Untouched(r"re:model\.generation_embeddings\.", "ends in the aligner"),
        Untouched(r"re:model\.generation_head\.vision_head\.", "stands behind proj_out"),
    ),
    when={"vision_config.depth": 2, "vq_config.num_hidden_layers": 2},
    notes="it draws too: a second head reads the stream, and what that one says is written back",
)

SHELLS: dict[str, Shell] = {
    "janus": JANUS,
    "apertus1p5": APERTUS1P5,
    "aria": ARIA,
    "ernie4_5_vl_moe": ERNIE,
    "nemotron_h_omni": NEMOTRON,
    "gemma3n": UNROTATED,
    "granite4_vision": GRANITE_VISION,
    "hunyuan_vl": HUNYUAN,
    "cohere_compass": QWEN3_VL,
    "inkling2_loop": UNROTATED,
}

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "aria_text": ARIA_TEXT,
    "ernie4_5_vl_moe_text": ERNIE_TEXT,
    "phi4_multimodal": PHI4,
    "granite4_vision_text": GRANITE,
    "hunyuan_vl_text": QWEN3,
}
