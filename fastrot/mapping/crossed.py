"""Decoders some of whose layers attend to an image or a protein, gated as a whole."""

from dataclasses import replace

from fastrot.mapping.dense import GATE_UP, LLAMA, QKV
from fastrot.mapping.roles import Architecture, NormMapping, Untouched

CROSS_QUERY = r"re:.*cross_attn\.q_proj$"

IDEFICS = Architecture(
    replace(
        LLAMA.mapping,
        attn=(r"re:model\.layers\.\d+\.self_attn$",),
        attn_q=(r"re:model\.layers\..*self_attn\.q_proj$",),
        attn_k=(r"re:model\.layers\..*self_attn\.k_proj$",),
        attn_v=(r"re:model\.layers\..*self_attn\.v_proj$",),
        readers=(CROSS_QUERY,),
        writers=(r"re:.*cross_attn\.o_proj$",),
        ignore=(
            Untouched(r"re:model\.vision_model\.", "sees the image, which is attended to"),
            Untouched(
                r"re:.*_attn\.[qk]_layer_norm\.weight$", "acts on queries and keys, before R3"
            ),
            Untouched(r"re:.*cross_attn\.[kv]_proj\.weight$", "reads the image"),
            Untouched(r"re:.*\.alpha_(cross_attn|dense)$", "scales what a layer adds as a whole"),
        ),
    ),
    (
        NormMapping(
            r"re:.*\.input_layernorm$", (r"re:model\.layers\..*self_attn\.[qkv]_proj$", CROSS_QUERY)
        ),
        NormMapping(r"re:.*\.post_attention_layernorm$", GATE_UP),
        LLAMA.norms[2],
    ),
    when={"additional_vocab_size": 0, "alpha_type": "float"},
    notes="some layers attend to the image, in a space of its own",
)

IDEFICS_INSIDE = replace(
    IDEFICS,
    mapping=replace(IDEFICS.mapping, embedding=(), lm_head=()),
    norms=(),
    when={},
    refuses={
        "R1": "a gate scales what some layers add channel by channel, or embedding and head hold a "
        "second matrix, for further tokens, in one module with the first"
    },
)

MLLAMA = replace(
    LLAMA,
    mapping=replace(
        LLAMA.mapping,
        readers=(CROSS_QUERY,),
        writers=(r"re:.*cross_attn\.o_proj$",),
        ignore=(
            Untouched(
                r"re:.*(cross_attn\.[kv]_proj|cross_attn\.[qk]_norm)\.weight$",
                "reads the image, or acts on queries and keys",
            ),
            Untouched(r"re:.*\.cross_attn_(attn|mlp)_gate$", "scales what a layer adds as a whole"),
        ),
    ),
    norms=(NormMapping(r"re:.*\.input_layernorm$", (*QKV, CROSS_QUERY)), *LLAMA.norms[1:]),
    notes="some layers attend to the image, in a space of its own",
)

ALIGNER_IN = (r"re:.*\.adapter\.query$", r"re:.*\.adapter\.ff\.fc1$")

EVOLLA = replace(
    LLAMA,
    mapping=replace(
        LLAMA.mapping,
        readers=ALIGNER_IN,
        writers=(r"re:.*\.adapter\.(out_proj|ff\.fc2)$",),
        ignore=(
            Untouched(r"re:model\.protein_encoder\.", "reads the protein, which is attended to"),
            Untouched(r"re:.*\.adapter\.(key|value)_protein\.", "reads the protein"),
            Untouched(
                r"re:.*\.adapter\.gate_(attention|ffw)$", "scales what a layer adds as a whole"
            ),
        ),
    ),
    norms=(
        *LLAMA.norms,
        NormMapping(r"re:.*\.adapter\.attention_norm$", ALIGNER_IN[:1]),
        NormMapping(r"re:.*\.adapter\.ff\.norm$", ALIGNER_IN[1:], kind="layer"),
    ),
    notes="some layers attend to a protein, in a space of its own, through a LayerNorm",
)

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "idefics": (IDEFICS, IDEFICS_INSIDE),
    "mllama_text_model": MLLAMA,
    "evolla": EVOLLA,
}
