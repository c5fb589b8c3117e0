"""The promise: a rotated model computes the same function."""

import copy
from functools import cache
from itertools import chain, combinations

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny

import fastrot
from fastrot.rotations import KINDS

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROTATIONS = ("R1", "R2", "R3", "R4")
SUBSETS = [*chain.from_iterable(combinations(ROTATIONS, n) for n in range(1, 5))]
CASES = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@cache
def original(model_type: str, tied: bool, dtype: torch.dtype):
    """The model before rotation, token ids, and its logits."""
    model = tiny(model_type, tied=tied, dtype=dtype)
    ids = random_ids(model, 4, 24, seed=1)
    return model, ids, logits(model, ids)


def rotated(model_type, tied, dtype, rotations, **kwargs):
    model, ids, before = original(model_type, tied, dtype)
    model = copy.deepcopy(model)
    fastrot.apply(model, rotations, **kwargs)
    return model, ids, before


def lift_float32_norms(model, monkeypatch):
    """Let the RMSNorms of a float64 model compute in float64 throughout."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, True) + self.variance_epsilon)

    for cls in {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(cls, "forward", forward)


def half(model_type, kind, tied, shift):
    """Every second subset, so that any two of model, kind, ties, subset and shift meet."""
    place = MODEL_TYPES.index(model_type) + list(KINDS).index(kind) + tied + shift
    return SUBSETS[place % 2 :: 2]


def check_float64_and_float32(model_type, kind, tied, subsets):
    for dtype, limit, chosen in zip(
        (torch.float64, torch.float32), (1e-6, 1e-5), subsets, strict=True
    ):
        for rotations in chosen:
            model, ids, before = rotated(
                model_type,
                tied,
                dtype,
                rotations,
                transform_type=kind,
                randomize=len(rotations) > 1,
            )
            assert relative_error(logits(model, ids), before) <= limit, (rotations, dtype)


def check_float64_without_the_norms_float32_cast(model_type, kind, tied, subsets, monkeypatch):
    model, ids, _ = original(model_type, tied, torch.float64)
    lift_float32_norms(model, monkeypatch)
    before = logits(model, ids)
    for rotations in subsets:
        model, _, _ = rotated(
            model_type,
            tied,
            torch.float64,
            rotations,
            transform_type=kind,
            precision=torch.float64,
            trust=True,  # the norms' forward is ours
        )
        assert relative_error(logits(model, ids), before) <= 1e-12, rotations


@pytest.mark.ours
@CASES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_float64_and_float32(model_type, kind, tied):
    subsets = [half(model_type, kind, tied, shift) for shift in range(2)]
    check_float64_and_float32(model_type, kind, tied, subsets)


@pytest.mark.ours
@CASES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_float64_without_the_norms_float32_cast(model_type, kind, tied, monkeypatch):
    subsets = half(model_type, kind, tied, 1)
    check_float64_without_the_norms_float32_cast(model_type, kind, tied, subsets, monkeypatch)


@pytest.mark.exhaustive
@CASES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_subset(model_type, kind, tied, monkeypatch):
    check_float64_and_float32(model_type, kind, tied, [SUBSETS, SUBSETS])
    check_float64_without_the_norms_float32_cast(model_type, kind, tied, SUBSETS, monkeypatch)


@pytest.mark.ours
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_is_as_good_as_the_original(model_type, kind):
    """Against float64, over several random models: the mean error grows by at most half."""
    errors = {"before": 0.0, "after": 0.0}
    for seed in range(4):
        model = tiny(model_type, seed=seed, dtype=torch.bfloat16)
        ids = random_ids(model, 8, 24, seed=seed)
        exact = logits(copy.deepcopy(model).double(), ids)
        errors["before"] += relative_error(logits(model, ids), exact)
        fastrot.apply(model, ROTATIONS, transform_type=kind, seed=seed)
        errors["after"] += relative_error(logits(model, ids), exact)
    assert errors["after"] <= 1.5 * errors["before"], errors


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 6], ids=["multi-query", "grouped", "multi-head"])
def test_head_layouts(model_type, kv_heads):
    model = tiny(model_type, dtype=torch.float64, kv_heads=kv_heads)
    ids = random_ids(model, 2, 16, seed=0)
    before = logits(model, ids)
    fastrot.apply(model, ROTATIONS, transform_type="random-hadamard", randomize=True)
    assert relative_error(logits(model, ids), before) <= 1e-6


@pytest.mark.ours
@pytest.mark.parametrize("hidden", [96, 80, 160])
@pytest.mark.parametrize("block_size", [8, 16, {"R1": 16, "R4": 28, "R2": 8, "R3": 4}, None])
def test_sizes_and_blocks(hidden, block_size):
    heads = {"heads": hidden // 16, "kv_heads": 1}
    model = tiny("llama", dtype=torch.float64, hidden=hidden, **heads)
    ids = random_ids(model, 2, 16, seed=0)
    before = logits(model, ids)
    fastrot.apply(model, ROTATIONS, transform_type="random-hadamard", block_size=block_size)
    assert relative_error(logits(model, ids), before) <= 1e-6


def test_letter_case_and_single_string():
    one, ids, before = rotated("llama", True, torch.float64, "r1")
    many, _, _ = rotated("llama", True, torch.float64, ["R1"])
    assert torch.equal(logits(one, ids), logits(many, ids))
    assert relative_error(logits(one, ids), before) <= 1e-6


def weight_edits(model_type):
    model, _, _ = original(model_type, True, torch.float64)
    plan = fastrot.plan(model, ROTATIONS)
    return [(edit.parameter, i) for edit in plan.weights for i in range(len(edit.steps))] + [
        (reset.parameter, None) for reset in plan.norms
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_single_edit_matters(model_type):
    """Negative control: a plan without one of its edits changes the logits."""
    model, ids, before = original(model_type, True, torch.float64)
    whole = fastrot.plan(model, ROTATIONS, transform_type="random-hadamard")

    def error_of(plan):
        changed = copy.deepcopy(model)
        fastrot.apply(changed, plan)
        return relative_error(logits(changed, ids), before)

    assert error_of(whole) <= 1e-6
    from dataclasses import replace

    for index, edit in enumerate(whole.weights):
        for skipped in range(len(edit.steps)):
            steps = (*edit.steps[:skipped], *edit.steps[skipped + 1 :])
            edits = list(whole.weights)
            edits[index] = replace(edit, steps=steps)
            error = error_of(replace(whole, weights=tuple(edits)))
            assert error > 1e-3, (edit.parameter, str(edit.steps[skipped]), error)
    for reset in whole.norms:
        left = tuple(r for r in whole.norms if r is not reset)
        assert error_of(replace(whole, norms=left)) > 1e-3, reset
    for site in whole.online:
        left = tuple(s for s in whole.online if s is not site)
        if site.location != "k_cache":  # without it the queries' hook has no partner to check
            assert error_of(replace(whole, online=left)) > 1e-3, site
