"""Patterns of names: a full name, ``re:`` and a regular expression, or a module's class name."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from fastrot.errors import RotationError


class NoMatchError(RotationError):
    """A pattern that names nothing in the model."""


def matches(name: str, pattern: str, thing: object = None) -> bool:
    """Whether a pattern names the module (or the parameter, without ``thing``) ``name``.

    Raises:
        RotationError: the regular expression does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise RotationError(
                f"pattern {pattern!r} is not a regular expression: {error}"
            ) from None
    if name == pattern:
        return True
    classes = type(thing).__mro__[:-2] if isinstance(thing, nn.Module) else ()
    return any(c.__name__ == pattern for c in classes)


def no_match_message(model: nn.Module, pattern: str, names: Iterable[str]) -> str:
    """What to say of a pattern without a match: the nearest names that do exist."""
    stem = re.sub(r"[^\w.]", "", pattern.removeprefix("re:")).strip(".")
    leaf = stem.split(".")[-1]
    by_leaf = {name.split(".")[-1]: name for name in names}
    near = [by_leaf[match] for match in get_close_matches(leaf, by_leaf, n=3, cutoff=0.3)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"pattern {pattern!r} matches nothing in {type(model).__name__}{hint}"
