"""More shells around language models: one projector for each, by its own names."""

from dataclasses import replace

from fastrot.mapping.dense import (
    ATTENTION,
    FEED_FORWARD_NORM,
    GEMMA2,
    GRANITE,
    INPUT_NORM,
    LAST_NORM,
    LLAMA,
    NANOCHAT,
    OLMO2,
    QWEN3,
)
from fastrot.mapping.experts import HEAD_GATE, LAGUNA, MOE, QUERY_KEY_NORMS
from fastrot.mapping.latent import INDEXER_IN, SPARSE
from fastrot.mapping.roles import Architecture, Norm, Shell, Untouched
from fastrot.mapping.vision import LLAVA, QWEN2_VL, QWEN_TOWER, TOWER

BEFORE_LAST = "stands before the projector's last layer"

KIMI = Shell(
    "model.language_model",
    writers=(r"re:model\.mm_projector\.out_proj$",),
    ignore=(TOWER, Untouched(r"re:model\.mm_projector\.(pre_norm|in_proj)\.", BEFORE_LAST)),
)

MINICPM = Shell(
    "model.language_model",
    writers=(r"re:model\.merger\.mlp\.0\.linear_2$",),
    ignore=(TOWER, Untouched(r"re:model\.merger\.mlp\.0\.(pre_norm|linear_1)\.", BEFORE_LAST)),
)

OVIS = Shell(
    "model.language_model",
    writers=(r"re:model\.visual_embeddings_table$",),
    ignore=(TOWER,),
    notes="what is seen is a mixture of the rows of a table",
)

PADDLE = Shell(
    "model.language_model",
    writers=(r"re:model\.projector\.linear_2$",),
    ignore=(
        Untouched(r"re:model\.visual\.", "sees the image and ends in the projector"),
        Untouched(r"re:model\.projector\.(pre_norm|linear_1)\.", BEFORE_LAST),
    ),
)

VIDEO_LLAMA = Shell(
    "model.language_model",
    writers=(r"re:model\.projector\.readout\.2$",),
    ignore=(TOWER, Untouched(r"re:model\.projector\.readout\.0\.", BEFORE_LAST)),
)

FUYU = Shell(
    "model.language_model",
    writers=(r"re:model\.vision_embed_tokens$",),
    notes="patches go through one matrix into the stream",
)

IDEFICS2 = Shell(
    "model.text_model",
    post_norm=(r"re:model\.connector\.perceiver_resampler\.norm$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.connector\.(modality_projection|perceiver_resampler\.(latents|layers))\b",
            "stands before the norm at the end of the connector",
        ),
    ),
    notes="the connector ends in a norm",
)

MOSS = replace(
    LLAVA,
    writers=(),
    post_norm=(r"re:model\.multi_modal_projector\.norm$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.multi_modal_projector\.linear_[12]\.",
            "stands before the norm at the end of the projector",
        ),
    ),
    notes="the projector ends in a norm",
)

COSMOS = Shell(
    "model.language_model",
    writers=(r"re:model\.projector\.linear_fc2$",),
    ignore=(
        Untouched(r"re:model\.visual\.", "sees the image and ends in the projector"),
        Untouched(r"re:model\.projector\.(norm|linear_fc1)\.", BEFORE_LAST),
    ),
)

MUSE = Shell(
    "model.language_model",
    writers=(r"re:model\.vision_projection$",),
    ignore=(TOWER, Untouched(r"re:model\.vision_adapter\.", BEFORE_LAST)),
    notes="a norm without parameters stands behind the projection",
)

DOCLING_MERGERS = (
    r"re:model\.vision_model\.connector\.(coarse|fine)\.deepstack_mergers\.\d+\.linear_2$",
)

DOCLING = Shell(
    "model.text_model",
    writers=DOCLING_MERGERS,
    between=DOCLING_MERGERS,
    post_norm=(r"re:model\.vision_model\.connector\.ln_out$",),
    ignore=(TOWER,),
    notes="the connector ends in a norm; deep-stack mergers write between layers",
)

GEMMA4_UNIFIED = Shell(
    "model.language_model",
    writers=(
        r"re:model\.embed_vision\.multimodal_embedder\.embedding_projection$",
        r"re:model\.embed_audio\.embedding_projection$",
    ),
    ignore=(
        Untouched(r"re:model\.embed_vision\.(patch|pos)_", "stands before the last projection"),
    ),
)

OMNI_TOWERS = (
    Untouched(r"re:model\.audio_tower\.", "hears the sound and ends in its projection"),
    QWEN_TOWER,
)

OMNI = replace(
    QWEN2_VL,
    writers=(*QWEN2_VL.writers, r"re:model\.audio_tower\.proj$"),
    ignore=(*OMNI_TOWERS, QWEN2_VL.ignore[1]),
)

OMNI_MERGERS = (r"re:model\.visual\.merger_list\.\d+\.mlp\.2$",)

OMNI_MOE = Shell(
    "model.language_model",
    writers=(*QWEN2_VL.writers, *OMNI_MERGERS, r"re:model\.audio_tower\.proj2$"),
    between=OMNI_MERGERS,
    ignore=(
        *OMNI_TOWERS,
        Untouched(
            r"re:model\.visual\.(merger|merger_list\.\d+)\.(ln_q|mlp\.0)\.",
            "stands before the merger's last layer",
        ),
    ),
    notes="deep-stack mergers write between layers",
)

MOLMO = Shell(
    "model.language_model",
    writers=(r"re:model\.multi_modal_projector\.image_projector\.down_proj$",),
    ignore=(
        TOWER,
        Untouched(
            r"re:model\.multi_modal_projector\.(image_pooling_2d|image_projector\.(gate|up)_proj)\.",
            BEFORE_LAST,
        ),
    ),
)

OCR = Shell(
    "model.language_model",
    writers=(
        r"re:model\.multi_modal_projector$",
        r"re:model\.image_newline$",
        r"re:model\.view_separator$",
    ),
    ignore=(TOWER,),
    notes="learned vectors at the end of each image line and of the image write too",
)

DEEPSEEK_OCR2 = replace(
    OCR,
    writers=(r"re:model\.multi_modal_projector$", r"re:model\.view_separator$"),
    notes="a learned vector at the end of each image writes too",
)

STEP = Shell(
    "model.language_model",
    writers=(r"re:model\.multi_modal_projector$",),
    ignore=(TOWER,),
)

DOTS = Shell(
    "model.language_model",
    writers=(
        r"re:model\.vision_tower\.merger\.mlp\.2$",
        r"re:model\.audio_tower\.adapter\.fc2$",
    ),
    ignore=(TOWER,),
)

MLLAMA = Shell(
    "model.language_model",
    ignore=(
        TOWER,
        Untouched(r"re:model\.multi_modal_projector\.", "ends in keys and values of their own"),
    ),
    notes="images are attended to, and never in the stream",
)

EMU3 = Shell(
    "model.text_model",
    ignore=(Untouched(r"re:model\.vqmodel\.", "turns a picture into token ids"),),
    notes="images are tokens",
)

BLIP2 = Shell(
    "language_model.model",
    writers=(r"re:language_projection$",),
    ignore=(
        TOWER,
        Untouched(r"re:(query_tokens|qformer\.)", "stands before the projection"),
    ),
    head="language_model.lm_head",
)

HYBRID = Shell(
    "model.language_model",
    writers=(r"re:model\.aligner\.proj$",),
    ignore=(
        TOWER,
        Untouched(r"re:model\.high_res_vision_", "sees the image and ends in the aligner"),
        Untouched(
            r"re:model\.aligner\.(high_res_)?vision_proj\.",
            "stands before the aligner's last layer",
        ),
    ),
)

UNROTATED = Shell("model.language_model", notes="nothing outside of its language model is rotated")
"""Around a decoder whose stream no rotation can pass."""

SHELLS: dict[str, Shell] = {
    "kimi_k25": KIMI,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM,
    "minicpm_ocr": MINICPM,
    "ovis2": OVIS,
    "paddleocr_vl": PADDLE,
    "video_llama_3": VIDEO_LLAMA,
    "fuyu": FUYU,
    "idefics2": IDEFICS2,
    "moss_transcribe_diarize": MOSS,
    "cosmos3_edge": COSMOS,
    "muse_glimmer": MUSE,
    "granite_docling": DOCLING,
    "gemma4_unified": GEMMA4_UNIFIED,
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe_thinker": OMNI_MOE,
    "molmo2": MOLMO,
    "unlimited_ocr": OCR,
    "step3p7": STEP,
    "dots3_note": DOTS,
    "fast_vlm": LLAVA,
    "perception_lm": LLAVA,
    "mllama": MLLAMA,
    "emu3": EMU3,
    "blip-2": BLIP2,
    "instructblip": BLIP2,
    "instructblipvideo": BLIP2,
    "deepseek_vl_hybrid": HYBRID,
    "hy_v4_vl": UNROTATED,
    "inkling_mm_model": UNROTATED,
    "inkling2": UNROTATED,
    "glm5_next": UNROTATED,
    "mistral_large4": UNROTATED,
    "muse_spark": UNROTATED,
    "qwen4_exp": UNROTATED,
    "deepseek_ocr2": DEEPSEEK_OCR2,
}

MUSE_TEXT = GEMMA2.replace(
    attn_gated=True,
    readers=(r"re:.*self_attn\.gate_proj$",),
    ignore=(),
    feeds={INPUT_NORM: ATTENTION, FEED_FORWARD_NORM: "mlp_in", Norm(LAST_NORM): "lm_head"},
    notes="norms before and after attention and MLP; a gate between values and output",
)

MOLMO_POST = OLMO2.replace(
    post_norm=(r"re:.*\.(input|post_attention)_layernorm$",), when={"norm_after": True}
)

STEP_TEXT = LAGUNA.replace(
    mlp_out=(r"re:.*mlp\.(shared_experts\.)?down_proj$",),
    writers=(r"re:.*mlp\.experts\.down_proj$",),
    ignore=(QUERY_KEY_NORMS,),
    offset=1.0,
    when={},
    notes="each head has a gate; R4 in MLPs and shared experts, not in experts",
)

DOTS_TEXT = SPARSE.replace(
    attn_v=(),
    attn_v_rows="all",
    attn_gated=True,
    readers=(INDEXER_IN, HEAD_GATE),
    ignore=(
        *SPARSE.mapping.ignore,
        Untouched(
            r"re:.*self_attn\.k_rope_only_layernorm\.weight$",
            "acts on the key that has a position, not on the stream",
        ),
    ),
    notes="each head has a gate, and layers differ in their heads; some have an indexer, which "
    "reads the stream too",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "paddleocr_vl_text": LLAMA,
    "cosmos3_edge_text": NANOCHAT.replace(notes="MLP without a gate"),
    "muse_glimmer_text": MUSE_TEXT,
    "granite_docling_text": GRANITE,
    "qwen2_5_omni_text": LLAMA,
    "qwen3_omni_moe_text": MOE,
    "molmo2_text": (MOLMO_POST, QWEN3),
    "unlimited_ocr_text": MOE,
    "deepseek_ocr2_text": MOE,
    "step3p5": STEP_TEXT,
    "dots3_note_text": DOTS_TEXT,
}
