"""Patterns of names: a full name, ``re:`` and a regular expression, or a module's class name."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class NoMatchError(ValueError):
    """A pattern that names nothing in the model."""


def matches(name: str, pattern: str, thing: object = None) -> bool:
    """Whether a pattern names the module (or the parameter, without ``thing``) ``name``.

    Raises:
        ValueError: the regular expression does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if name == pattern:
        return True
    classes = type(thing).__mro__[:-2] if isinstance(thing, nn.Module) else ()
    return any(c.__name__ == pattern for c in classes)


def find_modules(
    model: nn.Module,
    patterns: Iterable[str],
    ignore: Iterable[str] = (),
    *,
    missing_ok: bool = False,
) -> dict[str, nn.Module]:
    """The modules that any of the patterns names, in the model's order.

    Args:
        model: where to look.
        patterns: what to look for.
        ignore: patterns of modules to leave out.
        missing_ok: let patterns match nothing.

    Raises:
        NoMatchError: one of the patterns names nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    return _find(model, modules, patterns, ignore, missing_ok)


def find_holders(
    model: nn.Module,
    patterns: Iterable[str],
    ignore: Iterable[str] = (),
    *,
    missing_ok: bool = False,
) -> dict[str, nn.Module | nn.Parameter]:
    """As :func:`find_modules`, and bare parameters: those whose module the patterns do not name."""
    patterns = tuple(patterns)
    things: dict[str, nn.Module | nn.Parameter] = {}
    for owner, module in model.named_modules():
        named = any(matches(owner, pattern, module) for pattern in patterns)
        if owner:
            things[owner] = module
        for leaf, parameter in module.named_parameters(recurse=False):
            if not named and parameter is not None:
                things[f"{owner}.{leaf}" if owner else leaf] = parameter
    return _find(model, things, patterns, ignore, missing_ok)


def _find(
    model: nn.Module,
    things: Mapping[str, T],
    patterns: Iterable[str],
    ignore: Iterable[str],
    missing_ok: bool,
) -> dict[str, T]:
    found = set()
    for pattern in patterns:
        names = {name for name, thing in things.items() if matches(name, pattern, thing)}
        if not names and not missing_ok:
            raise NoMatchError(no_match_message(model, pattern, things))
        found |= names
    ignored = tuple(ignore)
    return {
        name: thing
        for name, thing in things.items()
        if name in found and not any(matches(name, pattern, thing) for pattern in ignored)
    }


def no_match_message(model: nn.Module, pattern: str, names: Iterable[str]) -> str:
    """What to say of a pattern without a match: the nearest names that do exist."""
    stem = re.sub(r"[^\w.]", "", pattern.removeprefix("re:")).strip(".")
    leaf = stem.split(".")[-1]
    by_leaf = {name.split(".")[-1]: name for name in names}
    near = [by_leaf[match] for match in get_close_matches(leaf, by_leaf, n=3, cutoff=0.3)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"pattern {pattern!r} matches nothing in {type(model).__name__}{hint}"
