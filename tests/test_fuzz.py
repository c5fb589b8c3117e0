"""Random settings of every family, random rotations: exact or refused, never silently wrong.

`FASTROT_FUZZ_EXAMPLES=100 pytest tests/test_fuzz.py` looks further than the everyday run.
"""

import os
from collections import Counter

import pytest
import torch
from helpers import relative_error
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_zoo import ROTATIONS, WithoutCasts, allowed, logits
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot.rotations import KINDS

EXAMPLES = int(os.environ.get("FASTROT_FUZZ_EXAMPLES", "2"))
IMPOSSIBLE = (
    ValueError,
    RuntimeError,
    TypeError,
    AssertionError,
    KeyError,
    IndexError,
    StrictDataclassError,
)
"""What transformers raises for settings that do not go together."""


@st.composite
def cases(draw, family, possible):
    """Settings of the configuration, arguments of ``apply``, and a seed of the weights."""
    changes = {key: draw(st.sampled_from(values)) for key, values in family.variations.items()}
    pool = draw(st.sampled_from([possible, possible, ROTATIONS]))
    subset = draw(st.lists(st.sampled_from(pool), min_size=1, unique=True))
    arguments = {
        "rotations": tuple(subset),
        "transform_type": draw(st.sampled_from(KINDS)),
        "randomize": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
        "precision": torch.float64,
    }
    if {"R1", "R4"}.intersection(subset):
        arguments["block_size"] = draw(st.sampled_from([None, None, 4, 8, 16]))
    return changes, arguments, draw(st.integers(0, 3))


def outcome(family, changes, arguments, seed):
    """``impossible``, ``refused`` or ``exact``; anything else is an error."""
    try:
        model = build(family, seed=seed, **changes)
        sees = inputs(family, model)
        before = logits(model, sees)
    except IMPOSSIBLE:
        return "impossible"
    if not torch.isfinite(before).all():
        return "impossible"
    try:
        fastrot.apply(model, undo="none", **arguments)
    except ValueError:
        assert torch.equal(logits(model, sees), before)
        return "refused"
    error = relative_error(logits(model, sees), before)
    assert error <= 1e-12, (changes, arguments, error)
    return "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_or_refused(name, record_property):
    found = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(FAMILIES[name], allowed(name)))
    def check(case):
        with WithoutCasts():
            found[outcome(FAMILIES[name], *case)] += 1

    check()
    for kind, count in found.items():
        record_property(kind, count)
    assert found["exact"] >= EXAMPLES // 4, found
