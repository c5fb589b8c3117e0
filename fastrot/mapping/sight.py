"""More shells around language models: one projector for each, by its own names."""

from dataclasses import replace

from fastrot.mapping.dense import LLAMA
from fastrot.mapping.roles import Architecture, Shell, Untouched
from fastrot.mapping.vision import LLAVA, TOWER

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
}

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {"paddleocr_vl_text": LLAMA}
