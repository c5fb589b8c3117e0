"""Decoders some of whose layers attend to an image or a protein, gated as a whole."""

from fastrot.mapping.dense import LLAMA
from fastrot.mapping.roles import Architecture, Norm, Untouched

CROSS_QUERY = r"re:.*cross_attn\.q_proj$"

IDEFICS = LLAMA.replace(
    attn=(r"re:model\.layers\.\d+\.self_attn$",),
    attn_q=(r"re:model\.layers\..*self_attn\.q_proj$",),
    attn_k=(r"re:model\.layers\..*self_attn\.k_proj$",),
    attn_v=(r"re:model\.layers\..*self_attn\.v_proj$",),
    readers=(CROSS_QUERY,),
    writers=(r"re:.*cross_attn\.o_proj$",),
    ignore=(
        Untouched(r"re:model\.vision_model\.", "sees the image, which is attended to"),
        Untouched(r"re:.*_attn\.[qk]_layer_norm\.weight$", "acts on queries and keys, before R3"),
        Untouched(r"re:.*cross_attn\.[kv]_proj\.weight$", "reads the image"),
        Untouched(r"re:.*\.alpha_(cross_attn|dense)$", "scales what a layer adds as a whole"),
    ),
    when={"additional_vocab_size": 0, "alpha_type": "float"},
    notes="some layers attend to the image, in a space of its own",
)

IDEFICS_INSIDE = IDEFICS.replace(
    embedding=(),
    lm_head=(),
    feeds={},
    when={},
    refuses={
        "R1": "a gate scales what some layers add channel by channel, or embedding and head hold a "
        "second matrix, for further tokens, in one module with the first"
    },
)

MLLAMA = LLAMA.replace(
    readers=(CROSS_QUERY,),
    writers=(r"re:.*cross_attn\.o_proj$",),
    ignore=(
        Untouched(
            r"re:.*(cross_attn\.[kv]_proj|cross_attn\.[qk]_norm)\.weight$",
            "reads the image, or acts on queries and keys",
        ),
        Untouched(r"re:.*\.cross_attn_(attn|mlp)_gate$", "scales what a layer adds as a whole"),
    ),
    notes="some layers attend to the image, in a space of its own",
)

ALIGNER_IN = (r"re:.*\.adapter\.query$", r"re:.*\.adapter\.ff\.fc1$")

EVOLLA = LLAMA.replace(
    readers=ALIGNER_IN,
    writers=(r"re:.*\.adapter\.(out_proj|ff\.fc2)$",),
    ignore=(
        Untouched(r"re:model\.protein_encoder\.", "reads the protein, which is attended to"),
        Untouched(r"re:.*\.adapter\.(key|value)_protein\.", "reads the protein"),
        Untouched(r"re:.*\.adapter\.gate_(attention|ffw)$", "scales what a layer adds as a whole"),
    ),
    feeds={
        **LLAMA.feeds,
        r"re:.*\.adapter\.attention_norm$": ALIGNER_IN[0],
        Norm(r"re:.*\.adapter\.ff\.norm$", kind="layer"): ALIGNER_IN[1],
    },
    notes="some layers attend to a protein, in a space of its own, through a LayerNorm",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "idefics": (IDEFICS, IDEFICS_INSIDE),
    "mllama_text_model": MLLAMA,
    "evolla": EVOLLA,
}
