"""Shells around language models: what else writes into the residual stream.

Projectors are named layer by layer, so that one with layers of another name is refused.
"""

from dataclasses import replace

from fastrot.mapping.dense import GLM4, LLAMA, QWEN3
from fastrot.mapping.experts import MOE
from fastrot.mapping.roles import Architecture, Shell, Untouched

TOWER = Untouched(
    r"re:(model\.)?(vision_tower|vision_model|audio_tower)\.",
    "sees the image (hears the sound) and ends in the projector",
)

PROJECTOR_INSIDE = Untouched(
    r"re:model\.multi_modal_projector"
    r"\.(linear_1|norm|layer_?norm|projector_layernorm|patch_merger\.merging_layer)\.",
    "stands before the projector's last layer",
)

LLAVA = Shell(
    "model.language_model",
    writers=(r"re:model\.multi_modal_projector\.linear_2$",),
    ignore=(TOWER, PROJECTOR_INSIDE),
)

LLAVA_NEXT = replace(
    LLAVA,
    writers=(*LLAVA.writers, r"re:model\.image_newline$"),
    notes="a learned vector at the end of each image line writes too",
)

LLAVA_NEXT_VIDEO = replace(
    LLAVA_NEXT,
    ignore=(
        *LLAVA.ignore,
        Untouched(r"re:model\.vision_resampler\.", "pools frames before the projector"),
    ),
)

QWEN_TOWER = Untouched(
    r"re:model\.visual\.(patch_embed|pos_embed|rotary_pos_emb|blocks)\.",
    "sees the image and ends in the merger",
)

QWEN2_VL = Shell(
    "model.language_model",
    writers=(r"re:model\.visual\.merger\.mlp\.2$",),
    ignore=(
        QWEN_TOWER,
        Untouched(
            r"re:model\.visual\.merger\.(ln_q|mlp\.0)\.", "stands before the merger's last layer"
        ),
    ),
)

DEEP_STACK = (r"re:model\.visual\.deepstack_merger_list\.\d+\.linear_fc2$",)

QWEN3_VL = Shell(
    "model.language_model",
    writers=(r"re:model\.visual\.merger\.linear_fc2$", *DEEP_STACK),
    between=DEEP_STACK,
    ignore=(
        QWEN_TOWER,
        Untouched(
            r"re:model\.visual\.(merger|deepstack_merger_list\.\d+)\.(norm|linear_fc1)\.",
            "stands before the merger's last layer",
        ),
    ),
    notes="deep-stack mergers write between layers",
)

QWEN3_5 = replace(QWEN3_VL, writers=QWEN3_VL.writers[:1], between=(), notes="")

GLM4V = Shell(
    "model.language_model",
    writers=(r"re:model\.visual\.merger\.down_proj$",),
    ignore=(
        Untouched(
            r"re:model\.visual\.(embeddings|patch_embed|rotary_pos_emb|post_conv_layernorm|blocks"
            r"|post_layernorm|downsample)\.",
            "sees the image and ends in the merger",
        ),
        Untouched(
            r"re:model\.visual\.merger\.(proj|post_projection_norm|gate_proj|up_proj)\.",
            "stands before the merger's last layer",
        ),
    ),
)

GEMMA3 = Shell(
    "model.language_model",
    writers=(r"re:model\.multi_modal_projector\.mm_input_projection_weight$",),
    transposed=(r"re:model\.multi_modal_projector\.mm_input_projection_weight$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.multi_modal_projector\.mm_soft_emb_norm\.",
            "stands before the projection",
        ),
    ),
    notes="the projection is a bare matrix, (in, out)",
)

GEMMA4 = Shell(
    "model.language_model",
    writers=(r"re:model\.embed_(vision|audio)\.embedding_projection$",),
    ignore=(TOWER,),
)

PALIGEMMA = Shell(
    "model.language_model",
    writers=(r"re:model\.multi_modal_projector\.linear$",),
    ignore=(TOWER,),
)

DEEPSEEK_VL = Shell(
    "model.language_model",
    writers=(r"re:model\.aligner\.linear2$",),
    ignore=(
        TOWER,
        Untouched(r"re:model\.aligner\.linear1\.", "stands before the aligner's last layer"),
    ),
)

LIGHTON = Shell(
    "model.language_model",
    writers=(r"re:model\.vision_projection\.linear_2$",),
    ignore=(
        Untouched(r"re:model\.vision_encoder\.", "sees the image and ends in the projection"),
        Untouched(
            r"re:model\.vision_projection\.(norm|patch_merger\.merging_layer|linear_1)\.",
            "stands before the projection's last layer",
        ),
    ),
)

VIDEO_LLAVA = replace(
    LLAVA,
    ignore=(
        Untouched(
            r"re:model\.(image|video)_tower\.", "sees images or video and ends in the projector"
        ),
        Untouched(
            r"re:model\.multi_modal_projector\.linear_1\.",
            "stands before the projector's last layer",
        ),
    ),
)

HYPERCLOVAX = Shell("model.language_model", writers=(r"re:model\.projector$",), ignore=(TOWER,))

MINIMAX_M3 = replace(
    LLAVA,
    writers=(r"re:model\.multi_modal_projector\.merge_linear_2$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.multi_modal_projector\.(linear_[12]|merge_linear_1)\.",
            "stands before the projector's last layer",
        ),
    ),
)

GOT_OCR = replace(
    LLAVA,
    writers=(r"re:model\.multi_modal_projector\.multimodal_projector$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.multi_modal_projector\.conv_upsampler[12]\.",
            "stands before the projector's last layer",
        ),
    ),
)

IDEFICS3 = Shell(
    "model.text_model",
    writers=(r"re:model\.connector\.modality_projection\.proj$",),
    ignore=(TOWER,),
)

LLAMA4 = Shell(
    "language_model.model",
    writers=(r"re:multi_modal_projector\.linear_1$",),
    ignore=(TOWER,),
    head="language_model.lm_head",
)

SHELLS: dict[str, Shell] = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_next_video": LLAVA_NEXT_VIDEO,
    "llava_onevision": LLAVA_NEXT,
    "vipllava": LLAVA,
    "mistral3": LLAVA,
    "internvl": LLAVA,
    "aya_vision": LLAVA,
    "cohere2_vision": LLAVA,
    "lfm2_vl": LLAVA,
    "lfm3_vl": LLAVA,
    "qianfan_ocr": LLAVA,
    "video_llava": VIDEO_LLAVA,
    "got_ocr2": GOT_OCR,
    "pp_chart2table": GOT_OCR,
    "minimax_m3_vl": MINIMAX_M3,
    "deepseek_vl": DEEPSEEK_VL,
    "lighton_ocr": LIGHTON,
    "hyperclovax_vision_v2": HYPERCLOVAX,
    "exaone4_5": QWEN2_VL,
    "cosmos3_omni": QWEN3_VL,
    "glmga": GLM4V,
    "glm_ocr": GLM4V,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "paligemma": PALIGEMMA,
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "llama4": LLAMA4,
    "glm4v": GLM4V,
    "glm46v": GLM4V,
    "glm4v_moe": GLM4V,
}

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3_vl_text": QWEN3,
    "qwen3_vl_moe_text": MOE,
    "glm4v_text": GLM4,
    "glm_ocr_text": GLM4,
    "glm4v_moe_text": MOE,
}
