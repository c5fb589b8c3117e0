"""Decoders with RMSNorm and one MLP a layer."""

from dataclasses import replace

from fastrot.mapping.roles import Architecture, Mapping, NormMapping, Untouched

HEAD_NORMS = Untouched(
    r"re:.*self_attn\.[qk]_norm\.weight$", "acts inside one head, before RoPE and R3"
)

LLAMA = Architecture(
    Mapping(
        embedding=("re:.*embed_tokens$",),
        attn=(r"re:.*self_attn$",),
        attn_q=(r"re:.*self_attn\.q_proj$",),
        attn_k=(r"re:.*self_attn\.k_proj$",),
        attn_v=(r"re:.*self_attn\.v_proj$",),
        attn_o=(r"re:.*self_attn\.o_proj$",),
        mlp_in=(r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$"),
        mlp_out=(r"re:.*mlp\.down_proj$",),
        lm_head=("lm_head",),
    ),
    (
        NormMapping(r"re:.*\.input_layernorm$", (r"re:.*self_attn\.[qkv]_proj$",)),
        NormMapping(r"re:.*\.post_attention_layernorm$", (r"re:.*mlp\.(gate|up)_proj$",)),
        NormMapping(r"re:.*model\.norm$", ("lm_head",)),
    ),
)

QWEN3 = replace(LLAMA, mapping=replace(LLAMA.mapping, ignore=(HEAD_NORMS,)))

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
}
