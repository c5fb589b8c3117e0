"""R2 and R3 where layers borrow keys and values, take keys for values, or differ in their heads."""

import copy

import pytest
import torch
from helpers import difference, fingerprint, relative_error
from test_zoo import WithoutCasts, logits
from transformers import DynamicCache
from transformers.cache_utils import Cache
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot.edits import Rotate
from fastrot.online import OnlineRotation

SHARED = pytest.mark.parametrize("name", ["gemma3n_shared", "gemma4_shared"])
OPTIONS = {"transform_type": "random-hadamard", "randomize": True, "precision": torch.float64}
BORROWED = {2: 0, 3: 1}
"""The layers of the zoo's models that borrow, and of which."""


def labels(plan, location=None):
    """By number of the layer, the label of what its queries or its output projection turn by."""
    found = {
        site.module.split(".")[2]: site.rotation.label
        for site in plan.online
        if site.location == location
    }
    for edit in plan.weights if location is None else ():
        if edit.parameter.endswith("o_proj.weight"):
            (step,) = (s for s in edit.steps if isinstance(s, Rotate) and s.group == "R2")
            found[edit.parameter.split(".")[2]] = step.rotation.label
    return {int(layer): label for layer, label in found.items()}


@SHARED
@pytest.mark.parametrize("location", ["q_attn", None], ids=["R3", "R2"])
def test_who_borrows_turns_with_the_lender(name, location):
    found = labels(fastrot.plan(build(FAMILIES[name]), ("R2", "R3"), **OPTIONS), location)
    assert found[0] != found[1]
    assert found.keys() == {0, 1, 2, 3}
    assert {layer: found[layer] for layer in BORROWED} == {
        layer: found[lender] for layer, lender in BORROWED.items()
    }


@SHARED
@pytest.mark.parametrize("cached", [True, False])
def test_keys_are_rotated_once_where_they_are_made(name, cached, monkeypatch):
    model = build(FAMILIES[name])
    given = inputs(FAMILIES[name], model)
    seen = []
    forward = OnlineRotation.forward

    def counted(self, x, part=False):
        seen.append(self.location)
        return forward(self, x, part)

    monkeypatch.setattr(OnlineRotation, "forward", counted)
    with WithoutCasts():
        before = logits(model, given, use_cache=cached)
        fastrot.apply(model, "R3", **OPTIONS)
        assert relative_error(logits(model, given, use_cache=cached), before) <= 1e-12
    assert sorted(seen) == ["k_cache"] * 2 + ["q_attn"] * 4


@SHARED
def test_step_by_step(name):
    """Past the sliding window, of which the cache keeps less than what is lent."""
    model = build(FAMILIES[name])
    ids = inputs(FAMILIES[name], model, length=14)["input_ids"]
    with WithoutCasts():
        before = logits(model, {"input_ids": ids})
        fastrot.apply(model, ("R2", "R3"), undo="none", **OPTIONS)
        cache: Cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [
                model(token, **{cache_name(model): cache}).logits
                for token in ids.split([6, *[1] * 8], 1)
            ]
    assert relative_error(torch.cat(steps, 1), before) <= 1e-12


def cache_name(model):
    from fastrot.integrations.transformers import cache_argument

    return next(iter(cache_argument(model, None)))


@SHARED
def test_without_a_borrower_s_rotation_it_shows(name):
    """Negative control: the queries of who borrows, and its output projection."""
    model = build(FAMILIES[name])
    given = inputs(FAMILIES[name], model)
    before = logits(model, given)
    for rotations in ("R2", "R3"):
        rotated = copy.deepcopy(model)
        fastrot.apply(rotated, rotations, undo="none", **OPTIONS)
        attention = rotated.model.layers[3].self_attn
        if rotations == "R3":
            del attention.fastrot_q_attn
        else:
            attention.o_proj.weight.data = model.model.layers[3].self_attn.o_proj.weight.data
        assert relative_error(logits(rotated, given), before) > 1e-3


def test_values_out_of_the_keys_projection_are_rotated_online():
    plan = fastrot.plan(build(FAMILIES["gemma4_text"]), "R2")
    assert [site.module for site in plan.online] == [
        f"model.layers.{layer}.self_attn.o_proj" for layer in (1, 3)
    ]
    made = [e.parameter for e in plan.weights if e.parameter.endswith("v_proj.weight")]
    assert made == [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 2)]
    assert {str(site.rotation) for site in plan.online} == {"hadamard 6x24"}


def test_every_head_by_itself():
    """Blocks stay within a head: 16 divides the rows of both sizes, but not a head of 24."""
    model = build(FAMILIES["gemma4_text"])
    given = inputs(FAMILIES["gemma4_text"], model)
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=r"block_size=16 of R2 does not divide .* 24"):
        fastrot.apply(model, "R2", block_size={"R2": 16})
    assert difference(before, fingerprint(model)) == []
    plain = logits(model, given)
    fastrot.apply(model, "R2", block_size={"R2": 8}, undo="none", precision=torch.float64)
    assert relative_error(logits(model, given), plain) <= 1e-6


def test_a_block_without_values_that_does_not_say_why_is_refused():
    model = build(FAMILIES["gemma4_text"])
    model.model.layers[1].self_attn.use_alternative_attention = False
    with pytest.raises(fastrot.RotationError, match=r"layers\.1\.self_attn needs one attn_v"):
        fastrot.plan(model, "R2")


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4_shared", "gemma3n_shared"])
def test_what_is_online_can_be_taken_off(name):
    model = build(FAMILIES[name])
    given = inputs(FAMILIES[name], model)
    before = logits(model, given)
    handle = fastrot.apply(model, ("R2", "R3"), **OPTIONS)
    handle.remove()
    assert not [m for m in model.modules() if isinstance(m, OnlineRotation)]
    assert relative_error(logits(model, given), before) <= 1e-6


def test_heads_of_several_sizes_need_rows_of_their_own():
    """In one matrix [q, k, v] the values' rows are found by one size."""
    model = build(FAMILIES["phi3"])
    model.model.layers[1].self_attn.head_dim = 8
    with pytest.raises(fastrot.RotationError, match="head size of Phi3ForCausalLM is not one"):
        fastrot.plan(model, "R2")
