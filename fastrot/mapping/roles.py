"""What a row of the tables is: the roles of a model's modules. Strings only, no torch.

A pattern is a full name, ``re:`` and a regular expression that is matched from the start of the
full name, or a class name (as in llm-compressor and compressed-tensors).
"""

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

from fastrot.errors import RotationError

Patterns = tuple[str, ...]
ValueRows = Literal["all", "qkv", "grouped", "latent"]
NormKind = Literal["rms", "layer", "scale"]

PLACES = {"R1": "embedding", "R2": "attn_o", "R3": "attn", "R4": "mlp_out"}
"""The rotations, each with the role without which it has no place."""
ROTATIONS = tuple(PLACES)
STREAM = "R1"
"""The rotation of the residual stream: all readers and writers take part in it, or none."""


def as_patterns(field: str, value: str | Sequence[str]) -> Patterns:
    """One pattern or several as a tuple.

    Raises:
        TypeError: something else than strings.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{field} must be a pattern or a list of patterns, got {value!r}")
    return tuple(patterns)


class Untouched(NamedTuple):
    """Parameters that neither read nor write the residual stream, and why."""

    pattern: str
    reason: str = ""


def _as_untouched(value: Any) -> tuple[Untouched, ...]:
    if isinstance(value, MappingABC):
        return tuple(Untouched(pattern, reason) for pattern, reason in value.items())
    several = isinstance(value, Iterable) and not isinstance(value, str)
    if several and all(isinstance(item, Untouched) for item in value):
        return tuple(value)
    return tuple(Untouched(pattern) for pattern in as_patterns("ignore", value))


@dataclass(frozen=True)
class Mapping:
    r"""The roles of a decoder's modules; the field names are llm-compressor's ``SpinQuantMapping``.

    A pattern names modules, or bare parameters where no module holds the weight by itself, such as
    ``re:.*experts\.down_proj$`` of stacked experts. A role that a model lacks is empty.

    Attributes:
        embedding: embeddings (tokens, learned positions), write the residual stream.
        attn: attention blocks, whose queries and keys R3 rotates, or the latents from which both
            keys and values are made.
        attn_q: read the stream, like ``attn_k`` and ``attn_v``.
        attn_k: see ``attn_q``.
        attn_v: see ``attn_q``; R2 rotates their output.
        attn_o: write the stream; R2 rotates their input.
        mlp_in: read the stream: gate, up, routers.
        mlp_out: write the stream; R4 rotates their input.
        lm_head: reads the stream after the last norm.
        attn_head_dim: size of one value head; None takes it from the model.
        ignore: *parameters* that neither read nor write the stream, as patterns or as a dict of
            patterns and reasons. Every parameter must have a role or stand here, else R1 refuses
            the model.
        attn_v_rows: which rows of ``attn_v`` are values: ``all``; ``qkv``, one matrix [q | k | v];
            ``grouped``, for each key head its queries, key and value; ``latent``, for each head
            [key | value] (multi-head latent attention, where ``attn_v`` reads a latent and not the
            stream).
        attn_gated: a gate, or a clip, stands between ``attn_v`` and ``attn_o``: R2 acts online, on
            the input of ``attn_o``, and leaves ``attn_v`` alone.
        readers: whatever else reads the stream.
        writers: whatever else writes it.
        latent_writers: write, in their first outputs, the latent that is cached in place of keys
            and values; R3 rotates it in the weights. A norm may follow, see ``norm_mappings``.
        latent_readers: make keys and values of it.
        post_norm: norms whose output is added to the stream (or is it): R1 rotates their output
            online.
        post_norm_in: the writers among the above that write into such a norm instead of the stream.
        transposed: the bare matrices among the above that are (in, out).
        between: those of the above that meet the stream between two layers, and lie in none.
        throughout: those of the above that lie in no layer and write before the first of them and
            between others, so that ``keep_head`` is refused.
    """

    embedding: Patterns = ()
    attn: Patterns = ()
    attn_q: Patterns = ()
    attn_k: Patterns = ()
    attn_v: Patterns = ()
    attn_o: Patterns = ()
    mlp_in: Patterns = ()
    mlp_out: Patterns = ()
    lm_head: Patterns = ()
    attn_head_dim: int | None = None
    ignore: tuple[Untouched, ...] = ()
    attn_v_rows: ValueRows = "all"
    attn_gated: bool = False
    readers: Patterns = ()
    writers: Patterns = ()
    latent_writers: Patterns = ()
    latent_readers: Patterns = ()
    post_norm: Patterns = ()
    post_norm_in: Patterns = ()
    transposed: Patterns = ()
    between: Patterns = ()
    throughout: Patterns = ()

    def __post_init__(self) -> None:
        for role in ROLES:
            object.__setattr__(self, role, as_patterns(role, getattr(self, role)))
        object.__setattr__(self, "ignore", _as_untouched(self.ignore))
        size = self.attn_head_dim
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TypeError(f"attn_head_dim must be a positive int or None, got {size!r}")
        if self.attn_v_rows not in get_args(ValueRows):
            known = ", ".join(get_args(ValueRows))
            raise TypeError(f"attn_v_rows must be one of {known}, got {self.attn_v_rows!r}")
        if not isinstance(self.attn_gated, bool):
            raise TypeError(f"attn_gated must be True or False, got {self.attn_gated!r}")

    @property
    def caches_latents(self) -> bool:
        """Whether the cache holds latents and keys with a position, in place of keys and values."""
        return bool(self.latent_writers) or self.attn_v_rows == "latent"

    @property
    def stream_readers(self) -> Patterns:
        """Everything that reads the residual stream, the head included."""
        values = () if self.attn_v_rows == "latent" else self.attn_v
        return (*self.attn_q, *self.attn_k, *values, *self.mlp_in, *self.readers, *self.lm_head)

    @property
    def stream_writers(self) -> Patterns:
        """Everything that writes it, or writes into a norm that does."""
        return (*self.embedding, *self.attn_o, *self.mlp_out, *self.writers)


ROLES = tuple(role.name for role in fields(Mapping) if role.type == Patterns)
"""The fields of a mapping that name modules."""


@dataclass(frozen=True)
class NormMapping:
    """A norm and the modules that read its output.

    Attributes:
        norm: the norms; None for readers that take the stream as it is, or after a norm without
            parameters.
        linears: the readers; each belongs to the norm with which its name shares most.
        offset: the norm multiplies by ``weight + offset`` (1 for Gemma's norms and LayerNorm1p).
        kind: ``rms``; ``layer`` for a LayerNorm: it centres, so R1 must fix the ones vector;
            ``scale`` if ``norm`` names a bare vector that multiplies what a norm without a scale
            makes, before the readers.
    """

    norm: str | None
    linears: Patterns
    offset: float = 0.0
    kind: NormKind = "rms"

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", as_patterns("linears", self.linears))
        if self.norm is not None and not isinstance(self.norm, str):
            raise TypeError(f"norm must be a pattern or None, got {self.norm!r}")
        number = isinstance(self.offset, (int, float)) and not isinstance(self.offset, bool)
        if not number or not abs(self.offset) < 2**63:
            raise TypeError(f"offset must be a number, got {self.offset!r}")
        if self.kind not in get_args(NormKind):
            known = ", ".join(get_args(NormKind))
            raise TypeError(f"kind must be one of {known}, got {self.kind!r}")


@dataclass(frozen=True)
class Norm:
    """A norm of a row that differs from the row's others; the fields are ``NormMapping``'s."""

    norm: str | None
    offset: float = 0.0
    kind: NormKind = "rms"


Feeds = MappingABC[str | Norm | None, str | Patterns]


@dataclass(frozen=True)
class Architecture:
    """One row: everything a rotation must know about a family of models.

    Attributes:
        mapping: the roles.
        feeds: norm → the roles that read its output, in ``mapping``; a norm is named as in
            :class:`NormMapping`. If norms divide a role among themselves, one of them names its
            readers by pattern, and the role stands for the rest of its patterns.
        offset: of the norms, as in :class:`NormMapping`; one that differs is a :class:`Norm`.
        kind: of the norms, likewise.
        when: attributes of the (text) configuration and the values for which the row holds; a model
            type may have several rows, of which the first that fits is taken.
        refuses: rotation → why it can't be done.
        notes: what is special, for the documentation.
    """

    mapping: Mapping
    feeds: Feeds = field(default_factory=dict)
    offset: float = 0.0
    kind: NormKind = "rms"
    when: MappingABC[str, Any] = field(default_factory=dict)
    refuses: MappingABC[str, str] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        feeds = {norm: as_patterns("feeds", readers) for norm, readers in self.feeds.items()}
        object.__setattr__(self, "feeds", feeds)

    @property
    def norms(self) -> tuple[NormMapping, ...]:
        """``feeds`` norm by norm, in patterns; a norm that has no readers is left out."""
        apart = {name for readers in self.feeds.values() for name in readers if name not in ROLES}

        def patterns(reader: str) -> Patterns:
            if reader not in ROLES:
                return (reader,)
            return tuple(p for p in getattr(self.mapping, reader) if p not in apart)

        norms = []
        for key, readers in self.feeds.items():
            norm = key if isinstance(key, Norm) else Norm(key, self.offset, self.kind)
            linears = tuple(chain.from_iterable(map(patterns, readers)))
            if linears:
                norms.append(NormMapping(norm.norm, linears, norm.offset, norm.kind))
        return tuple(norms)

    def replace(self, **changes: Any) -> "Architecture":
        """The row with other fields, or with other roles in its mapping, by their names."""
        names = (role.name for role in fields(Mapping) if role.name in changes)
        roles = {name: changes.pop(name) for name in names}
        mapping = replace(changes.pop("mapping", self.mapping), **roles)
        return replace(self, mapping=mapping, **changes)


@dataclass(frozen=True)
class Shell:
    """A model around a language model: vision towers and their projectors.

    Attributes:
        text: full name of the language model's base (without head); the patterns of its row are
            sought below it.
        writers: what writes image features into the residual stream: the last linear of projectors.
        readers: heads beside the language model's, which read what that one reads.
        transposed: the bare matrices among them that are (in, out).
        between: those of them that write between two layers of the language model.
        throughout: those of them that write before its first layer and between others.
        ignore: parameters of the towers; a parameter that a writer owns need not be left out.
        post_norm: norms at the end of projectors, whose output goes into the stream.
        head: full name of the language model's head.
        when: attributes of the configuration and the values for which the shell holds.
        notes: what is special, for the documentation.
    """

    text: str
    writers: Patterns = ()
    readers: Patterns = ()
    transposed: Patterns = ()
    between: Patterns = ()
    throughout: Patterns = ()
    ignore: tuple[Untouched, ...] = ()
    post_norm: Patterns = ()
    head: str = "lm_head"
    when: MappingABC[str, Any] = field(default_factory=dict)
    notes: str = ""


def with_head(row: Architecture, head: str) -> Architecture:
    """The row of a model that has another head in the place of the language model's."""
    return row.replace(lm_head=tuple(head for _ in row.mapping.lm_head))


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
        raise RotationError(f"{argument}: unknown {', '.join(unknown)}; fields: {', '.join(names)}")
    try:
        return cls(**value)
    except TypeError as error:
        raise TypeError(f"{argument}: {error}") from None
