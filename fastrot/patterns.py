"""Patterns of module names: a full name, ``re:`` and a regular expression, or a class name."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn


class NoMatchError(ValueError):
    """A pattern that names nothing in the model."""


def matches(name: str, pattern: str, module: nn.Module | None = None) -> bool:
    """Whether a pattern names the module (or the parameter, without ``module``) ``name``.

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
    return module is not None and any(c.__name__ == pattern for c in type(module).__mro__[:-2])


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
    found = set()
    for pattern in patterns:
        names = {name for name, module in modules.items() if matches(name, pattern, module)}
        if not names and not missing_ok:
            raise NoMatchError(no_match_message(model, pattern, modules))
        found |= names
    ignored = tuple(ignore)
    return {
        name: module
        for name, module in modules.items()
        if name in found and not any(matches(name, pattern, module) for pattern in ignored)
    }


def no_match_message(model: nn.Module, pattern: str, names: Iterable[str]) -> str:
    """What to say of a pattern without a match: the nearest names that do exist."""
    stem = re.sub(r"[^\w.]", "", pattern.removeprefix("re:")).strip(".")
    leaf = stem.split(".")[-1]
    by_leaf = {name.split(".")[-1]: name for name in names}
    near = [by_leaf[match] for match in get_close_matches(leaf, by_leaf, n=3, cutoff=0.3)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"pattern {pattern!r} matches nothing in {type(model).__name__}{hint}"
