"""All rows by transformers' ``model_type``, and how a model's configuration finds its own."""

import re
from collections.abc import Mapping as MappingABC
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeVar

from fastrot.errors import RotationError
from fastrot.mapping import (
    crossed,
    dense,
    experts,
    hybrid,
    latent,
    layernorm,
    mixed,
    sight,
    singular,
    unrotated,
    vision,
)
from fastrot.mapping.refused import REFUSED, reasons_of
from fastrot.mapping.roles import ROLES, Architecture, Norm, Shell, Untouched

ARCHITECTURES: dict[str, Architecture | tuple[Architecture, ...]] = {
    **dense.ROWS,
    **layernorm.ROWS,
    **experts.ROWS,
    **latent.ROWS,
    **hybrid.ROWS,
    **singular.ROWS,
    **crossed.ROWS,
    **unrotated.ROWS,
    **vision.ROWS,
    **sight.ROWS,
    **mixed.ROWS,
}
"""``model_type`` of a (text) configuration → its row, or several for different settings."""

SHELLS: dict[str, Shell] = {**vision.SHELLS, **sight.SHELLS, **mixed.SHELLS}
"""``model_type`` of a multimodal configuration → what surrounds its language model."""

Row = TypeVar("Row", Architecture, Shell)


class UnknownArchitectureError(RotationError):
    """No row for this model."""


def find_architecture(config: Any) -> Architecture:
    """The row of a model's configuration; for a multimodal one, its language model's in its shell.

    Raises:
        UnknownArchitectureError: there is none; says why if that is known, else names the nearest
            known ones, and the way out.
    """
    shell = SHELLS.get(config.model_type)
    if shell is None:
        return _find_row(config)
    return _inside(_find_row(config.get_text_config()), _fitting(config, (shell,)))


def _find_row(config: Any) -> Architecture:
    model_type = config.model_type
    rows = ARCHITECTURES.get(model_type)
    if model_type in REFUSED:
        reasons = "; ".join(f"{names}: {why}" for names, why in reasons_of(model_type))
        raise UnknownArchitectureError(
            f"fastrot has no row for {model_type!r} models, on purpose: {reasons}; "
            "`fastrot architectures` lists what it rotates; what can be done to this one takes "
            "mappings= and norm_mappings="
        )
    if rows is None:
        near = get_close_matches(model_type, {**ARCHITECTURES, **SHELLS}, n=3, cutoff=0.4)
        names = f" (nearest known: {', '.join(near)})" if near else ""
        raise UnknownArchitectureError(
            f"model type {model_type!r} has no row in fastrot's table{names}; describe it with "
            "mappings= and norm_mappings=, fastrot.suggest_mapping(model) proposes them; "
            "`fastrot architectures` lists the known ones"
        )
    return _fitting(config, rows if isinstance(rows, tuple) else (rows,))


def _fitting(config: Any, rows: tuple[Row, ...]) -> Row:
    """The first that holds for this configuration."""
    for row in rows:
        if _fits(row.when, config):
            return row
    settings = " or ".join(
        " and ".join(f"{name}={value!r}" for name, value in row.when.items()) for row in rows
    )
    flags = dict.fromkeys(name for row in rows for name in row.when)
    actual = ", ".join(f"{name}={_setting(config, name)!r}" for name in flags)
    raise UnknownArchitectureError(
        f"fastrot knows {config.model_type} models with {settings}; this one has {actual}, which "
        "changes what reads and writes its residual stream; describe it with mappings= and "
        "norm_mappings="
    )


def _fits(when: MappingABC[str, Any], config: Any) -> bool:
    return all(_setting(config, name) == value for name, value in when.items())


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def _inside(row: Architecture, shell: Shell) -> Architecture:
    """The row of a language model, sought only where its shell keeps it."""
    mapping = row.mapping
    scoped: dict[str, Any] = {
        role: tuple(_scoped(pattern, shell) for pattern in getattr(mapping, role)) for role in ROLES
    }
    inner = (Untouched(_scoped(u.pattern, shell), u.reason) for u in mapping.ignore)
    mapping = replace(mapping, **scoped, ignore=(*inner, *shell.ignore))
    feeds = {
        _scoped_norm(norm, shell): (
            *(reader if reader in ROLES else _scoped(reader, shell) for reader in readers),
            *(shell.readers if "lm_head" in readers else ()),
        )
        for norm, readers in row.feeds.items()
    }
    return row.replace(
        mapping=mapping,
        feeds=feeds,
        readers=(*mapping.readers, *shell.readers),
        writers=(*mapping.writers, *shell.writers),
        transposed=(*mapping.transposed, *shell.transposed),
        between=(*mapping.between, *shell.between),
        throughout=(*mapping.throughout, *shell.throughout),
        post_norm=(*mapping.post_norm, *shell.post_norm),
        notes="; ".join(note for note in (row.notes, shell.notes) if note),
    )


def _scoped_norm(norm: str | Norm | None, shell: Shell) -> str | Norm | None:
    if isinstance(norm, Norm):
        return replace(norm, norm=norm.norm and _scoped(norm.norm, shell))
    return norm and _scoped(norm, shell)


def _scoped(pattern: str, shell: Shell) -> str:
    if not pattern.startswith("re:"):
        return shell.head if pattern == "lm_head" else pattern
    places = rf"(?={re.escape(shell.text)}\.|{re.escape(shell.head)}\b)"
    return f"re:{places}(?:{pattern.removeprefix('re:')})"
