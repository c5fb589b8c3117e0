"""Patterns of names: a full name, ``re:`` and a regular expression, or a module's class name."""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from torch import nn

from fastrot.errors import RotationError

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_parse


class NoMatchError(RotationError):
    """A pattern that names nothing in the model."""


def matches(name: str, pattern: str, thing: object = None) -> bool:
    """Whether a pattern names the module (or the parameter, without ``thing``) ``name``.

    Raises:
        RotationError: the regular expression does not compile, or could take forever.
    """
    if pattern.startswith("re:"):
        return _compiled(pattern).match(name) is not None
    if name == pattern:
        return True
    classes = type(thing).__mro__[:-2] if isinstance(thing, nn.Module) else ()
    return any(c.__name__ == pattern for c in classes)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        parsed = sre_parse.parse(pattern.removeprefix("re:"))
        compiled = re.compile(pattern.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise RotationError(
            f"pattern {pattern!r:.200} is not a regular expression: {error}"
        ) from None
    repeats, optional = _costs(parsed, False)
    if repeats > 3 or optional > 8 or len(pattern) > 1000:
        raise RotationError(
            f"pattern {pattern!r:.200} could take forever to match: it may have three repeats such "
            "as .* and eight optional parts, none in another and no alternatives in them; name the "
            "modules more directly"
        )
    return compiled


def _costs(node: Any, repeated: bool) -> tuple[float, int]:
    """How many repeats and optional parts are in a parsed expression; infinite if nested."""
    repeats: float = 0
    optional = 0
    for operation, value in node:
        name, inside = str(operation), repeated
        if name.endswith("_REPEAT"):
            low, high, _ = value
            optional += (int(low), int(high)) == (0, 1)
            repeats += int(high) > 1
            inside = repeated or int(high) > 1
            repeats += math.inf if repeated else 0
        elif name.startswith("GROUPREF") or (name == "BRANCH" and repeated):
            repeats = math.inf
        optional += name == "BRANCH"
        for part in _parts(value):
            more, parts = _costs(part, inside)
            repeats, optional = repeats + more, optional + parts
    return repeats, optional


def _parts(value: Any) -> Iterator[Any]:
    """The expressions in the value of a parsed operation."""
    if isinstance(value, sre_parse.SubPattern):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)


def no_match_message(model: nn.Module, pattern: str, names: Iterable[str]) -> str:
    """What to say of a pattern without a match: the nearest names that do exist."""
    stem = re.sub(r"[^\w.]", "", pattern.removeprefix("re:")).strip(".")
    leaf = stem.split(".")[-1]
    by_leaf = {name.split(".")[-1]: name for name in names}
    near = [by_leaf[match] for match in get_close_matches(leaf, by_leaf, n=3, cutoff=0.3)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"pattern {pattern!r} matches nothing in {type(model).__name__}{hint}"
