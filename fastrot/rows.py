"""The row of the table that describes a model, fitted to what the model has."""

from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastrot.errors import RotationError
from fastrot.index import Index, find_holders
from fastrot.mapping import (
    PLACES,
    ROLES,
    STREAM,
    Architecture,
    Mapping,
    Norm,
    NormMapping,
    as_mapping,
    find_architecture,
    with_head,
)
from fastrot.patterns import matches

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where torch's wrappers keep the module: of compile, of activation checkpointing and of FSDP."""

CLASSIFIERS = ("score", "classifier")
"""What transformers' classifiers have in the place of a causal model's head."""


class UnsupportedRotationError(RotationError):
    """A rotation that this architecture does not allow."""


def roles_of(
    index: Index,
    mappings: Mapping | MappingABC[str, Any] | None,
    norms: tuple[NormMapping, ...] | None,
    wanted: Sequence[str],
) -> tuple[Mapping, tuple[NormMapping, ...]]:
    """The roles of a model's modules and its norms: the caller's, or those of the table.

    Raises:
        UnsupportedRotationError: the table says why one of the wanted rotations is impossible.
    """
    if mappings is not None:
        return as_mapping(mappings), known_norms(index) if norms is None else norms
    row = find_architecture(index.config)
    for name in wanted:
        if name in row.refuses:
            rest = [other for other in wanted if other not in row.refuses]
            way = f"; leave it out, rotations={tuple(rest)!r} works" if rest else ""
            raise UnsupportedRotationError(
                f"{name} of {index.class_name}: {row.refuses[name]}{way}"
            )
    _refuse_wrapped(index, row.mapping, wanted)
    row = present(index, row)
    return row.mapping, row.norms if norms is None else norms


def _refuse_wrapped(index: Index, mapping: Mapping, wanted: Sequence[str]) -> None:
    """A wrapper renames what it holds: a rotation would leave out its layer and none would see."""
    roles = ROLES if STREAM in wanted else tuple(PLACES[name] for name in wanted)
    patterns = tuple(pattern for role in roles for pattern in getattr(mapping, role))
    for name in index.parameters:
        *modules, _ = name.split(".")
        plain = [part for part in modules if part not in WRAPPERS]
        if plain == modules:
            continue
        if any(matches(".".join(plain), pattern) for pattern in patterns):
            inside = next(i for i, part in enumerate(modules) if part in WRAPPERS)
            raise UnsupportedRotationError(
                f"{'.'.join(modules[:inside])} of {index.class_name} is wrapped in another module "
                f"({modules[inside]}), so that its layer would be left out of "
                f"{', '.join(wanted)}; compile and wrap after fastrot.apply, or compile in place, "
                "module.compile()"
            )


def known_norms(index: Index) -> tuple[NormMapping, ...]:
    """The norms of the table, none for a model that is not in it."""
    try:
        return present(index, find_architecture(index.config)).norms
    except ValueError:
        return ()


def present(index: Index, row: Architecture) -> Architecture:
    """A row of the table with the head of this model, without what it does not have."""
    headless = not find_holders(index, row.mapping.lm_head, missing_ok=True)
    heads = [h for h in CLASSIFIERS if isinstance(getattr(index.model, h, None), nn.Linear)]
    if headless and len(heads) == 1:
        row = with_head(row, heads[0])
    mapping = row.mapping

    def kept(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(p for p in patterns if find_holders(index, (p,), missing_ok=True))

    roles = {role: kept(getattr(mapping, role)) for role in ROLES}
    names = index.parameters
    ignore = tuple(u for u in mapping.ignore if any(matches(name, u.pattern) for name in names))
    feeds = {
        Norm(norm.norm, norm.offset, norm.kind): kept(norm.linears)
        for norm in row.norms
        if norm.norm is None or kept((norm.norm,))
    }
    return row.replace(feeds=feeds, ignore=ignore, **roles)
