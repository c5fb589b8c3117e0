"""Patterns of names: those of the tables pass, those that could take forever are refused."""

import time

import pytest

import fastrot
from fastrot.mapping import ARCHITECTURES, SHELLS
from fastrot.patterns import matches

SLOW = [
    "re:(a+)+$",
    "re:(a*)*$",
    "re:(.*a){20}$",
    "re:(a|a)*$",
    "re:(a?){40}$",
    "re:" + "a?" * 30 + "a" * 30,
    "re:.*.*.*.*.*.*b$",
    "re:" + "(a|a)" * 30 + "$",
    r"re:(a*)\1$",
    "re:(?=(a+)+$)",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_what_could_take_forever_is_refused(pattern):
    start = time.monotonic()
    with pytest.raises(fastrot.RotationError, match="could take forever"):
        matches("a" * 60 + "!", pattern)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:(?P<a", "re:" + "(" * 5000])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(fastrot.RotationError, match="is not a regular expression"):
        matches("a", pattern)


def test_those_of_the_tables_pass():
    rows = [*ARCHITECTURES.values(), *SHELLS.values()]
    found = {part for part in repr(rows).split("'") if part.startswith("re:")}
    assert len(found) > 100
    for pattern in found:
        matches("model.layers.0.mlp.down_proj", pattern.replace("\\\\", "\\"))
