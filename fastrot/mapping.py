"""The tables: which modules read and write the residual stream. Strings only, one row a shape.

A pattern is a module's full name, ``re:`` and a regular expression that is matched from the start
of the full name, or a class name (as in llm-compressor and compressed-tensors).
"""

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

Patterns = tuple[str, ...]


class UnknownArchitectureError(ValueError):
    """No row for this model type."""


def as_patterns(field: str, value: str | Sequence[str]) -> Patterns:
    """One pattern or several as a tuple.

    Raises:
        TypeError: something else than strings.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{field} must be a pattern or a list of patterns, got {value!r}")
    return tuple(patterns)


@dataclass(frozen=True)
class Mapping:
    """The roles of a decoder's modules; the field names are llm-compressor's ``SpinQuantMapping``.

    Attributes:
        embedding: token embedding, writes the residual stream.
        attn: attention blocks, whose queries and keys R3 rotates.
        attn_q: read the stream, like ``attn_k`` and ``attn_v``.
        attn_k: see ``attn_q``.
        attn_v: see ``attn_q``; R2 rotates their output.
        attn_o: write the stream; R2 rotates their input.
        mlp_in: read the stream: gate, up, routers.
        mlp_out: write the stream; R4 rotates their input.
        lm_head: reads the stream after the last norm.
        attn_head_dim: size of one value head; None takes it from the model.
        ignore: *parameters* that neither read nor write the stream. Every parameter must have a
            role or stand here, else R1 refuses the model.
    """

    embedding: Patterns
    attn: Patterns
    attn_q: Patterns
    attn_k: Patterns
    attn_v: Patterns
    attn_o: Patterns
    mlp_in: Patterns
    mlp_out: Patterns
    lm_head: Patterns
    attn_head_dim: int | None = None
    ignore: Patterns = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "attn_head_dim":
                patterns = as_patterns(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, patterns)
        size = self.attn_head_dim
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TypeError(f"attn_head_dim must be a positive int or None, got {size!r}")


@dataclass(frozen=True)
class NormMapping:
    """A norm and the modules that read its output.

    Attributes:
        norm: the norms; None for readers that take the stream as it is.
        linears: the readers; each belongs to the norm with which its name shares most.
        offset: the norm multiplies by ``weight + offset`` (1 for Gemma's norms).
    """

    norm: str | None
    linears: Patterns
    offset: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", as_patterns("linears", self.linears))
        if self.norm is not None and not isinstance(self.norm, str):
            raise TypeError(f"norm must be a pattern or None, got {self.norm!r}")
        if not isinstance(self.offset, (int, float)) or isinstance(self.offset, bool):
            raise TypeError(f"offset must be a number, got {self.offset!r}")


@dataclass(frozen=True)
class Architecture:
    """One row: everything a rotation must know about a family of models."""

    mapping: Mapping
    norms: tuple[NormMapping, ...]


_LLAMA = Architecture(
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
        NormMapping("model.norm", ("lm_head",)),
    ),
)

# The per-head norms act before RoPE and R3, inside one head: no rotation reaches them.
_QWEN3 = replace(
    _LLAMA,
    mapping=replace(_LLAMA.mapping, ignore=(r"re:.*self_attn\.[qk]_norm\.weight$",)),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
}
"""transformers' ``model_type`` → row."""


def find_architecture(model_type: str) -> Architecture:
    """The row of a model type.

    Raises:
        UnknownArchitectureError: there is none; names the nearest known ones and the way out.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    near = get_close_matches(model_type, ARCHITECTURES, n=3, cutoff=0.4)
    known = f"nearest known: {', '.join(near)}" if near else f"known: {', '.join(ARCHITECTURES)}"
    raise UnknownArchitectureError(
        f"model type {model_type!r} has no row in fastrot's table ({known}); "
        "describe it with mappings= and norm_mappings="
    )


def as_mapping(value: Mapping | MappingABC[str, Any] | Any) -> Mapping:
    """A :class:`Mapping` from itself, a dict, or an object with the same fields."""
    return value if isinstance(value, Mapping) else _build(Mapping, value, "mappings")


def as_norm_mapping(value: NormMapping | MappingABC[str, Any] | Any) -> NormMapping:
    """A :class:`NormMapping` from itself, a dict, or an object with the same fields."""
    return value if isinstance(value, NormMapping) else _build(NormMapping, value, "norm_mappings")


def _build(cls: type[Any], value: Any, argument: str) -> Any:
    names = [field.name for field in fields(cls)]
    if not isinstance(value, MappingABC):
        found = {name: getattr(value, name) for name in names if hasattr(value, name)}
        if not found:
            raise TypeError(f"{argument}: {type(value).__name__} is not a {cls.__name__} or dict")
        value = found
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ValueError(f"{argument}: unknown {', '.join(unknown)}; fields: {', '.join(names)}")
    try:
        return cls(**value)
    except TypeError as error:
        raise TypeError(f"{argument}: {error}") from None
