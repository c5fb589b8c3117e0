"""What was applied last comes off first, also of a model that was saved: JSON sorts names."""

import copy

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from test_zoo import logits as zoo_logits
from test_zoo import original
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import FAMILIES

import fastrot
from fastrot import Rotation
from fastrot.online import installed


def online(targets, location, head_dim):
    into = {"targets": ["re:.*o_proj$"], "location": "weight_input", "inverse": True}
    return {
        "type": "random-hadamard",
        "head_dim": head_dim,
        "apply": [{"targets": [targets], "location": location}, into],
    }


LATER_FIRST = {
    "config_groups": {
        "Z": online("re:.*v_proj$", "output", 16),
        "A": online("re:.*o_proj$", "input", None),
    }
}
"""Both turn the input of the output projection: Z first, which sorts last."""


@pytest.fixture
def pair(tmp_path):
    model = tiny("llama", dtype=torch.float64, heads=4, kv_heads=4, head_dim=16, hidden=64)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, transform_config=LATER_FIRST, precision="float64")
    rotated.save_pretrained(tmp_path)
    return model, rotated, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)


@pytest.mark.parametrize("groups", [None, "A", ("A", "Z")])
@pytest.mark.parametrize("which", ["in memory", "loaded"])
def test_the_last_comes_off_alone_and_both_together(which, groups, pair):
    model, *both = pair
    rotated = both[which == "loaded"]
    ids = random_ids(model, 2, 12, seed=0)
    fastrot.remove(rotated, groups)
    left = {rotation.group for _, _, rotation in installed(rotated)}
    assert left == ({"Z"} if groups == "A" else set())
    assert relative_error(logits(rotated, ids), logits(model, ids)) <= 1e-6


@pytest.mark.parametrize("which", ["in memory", "loaded"])
def test_the_first_does_not_come_off_alone(which, pair):
    rotated = pair[1 + (which == "loaded")]
    before = fingerprint(rotated)
    with pytest.raises(fastrot.RotationError, match="Z can't be taken off alone"):
        fastrot.remove(rotated, "Z")
    assert difference(before, fingerprint(rotated)) == []


def test_a_record_without_the_order_is_not_guessed(pair):
    from fastrot.record import sealed

    _, _, loaded = pair
    record = copy.deepcopy(loaded.config.fastrot)
    del record["applied"][0]["order"]
    loaded.config.fastrot = sealed(record, loaded)
    with pytest.raises(fastrot.RotationError, match="can't be taken off alone"):
        fastrot.remove(loaded)


@pytest.mark.skipif("gemma4_text" not in FAMILIES, reason="this transformers has no gemma4")
def test_values_that_only_some_layers_turn_online_stay():
    """R2 of Gemma 4 is in the weights of other layers; of given matrices these are not known."""
    model, given, before = original("gemma4_text")
    rotated = copy.deepcopy(model)
    matrix = Rotation("random-matrix", 8, seed=1).operand
    fastrot.apply(rotated, ("R2", "R3", "R4"), matrices={"R2": matrix}, precision="float64")
    groups = {rotation.group for _, _, rotation in installed(rotated)}
    fastrot.remove(rotated)
    assert {rotation.group for _, _, rotation in installed(rotated)} == groups & {"R2"}
    assert relative_error(zoo_logits(rotated, given), before) <= FAMILIES["gemma4_text"].exact


def test_a_part_is_not_taken_for_the_whole():
    """Nor a shallow copy, whose modules are those of another model."""
    model = tiny("llama")
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, "R4")
    shallow = copy.copy(model)
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=r"'model' of a LlamaForCausalLM"):
        fastrot.remove(model.model)
    with pytest.raises(fastrot.RotationError, match=r"delete that model.*trust=True"):
        fastrot.remove(shallow)
    assert difference(before, fingerprint(model)) == []
    fastrot.remove(model, trust=True)
    assert relative_error(logits(model, ids), expected) <= 1e-5


@pytest.mark.parametrize("function", [fastrot.remove, fastrot.restore])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda model: "x", "expected a transformers model, got str"),
        (nn.Sequential, "Sequential has no transformers config"),
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
    ],
)
def test_what_is_no_model(function, given, words):
    model = tiny("llama")
    fastrot.apply(model, "R4")
    with pytest.raises(TypeError, match=words):
        function(given(model))


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [(5, TypeError, "got 5"), ([5], TypeError, r"got \[5\]"), ([], ValueError, "groups is empty")],
)
def test_what_names_no_rotation(groups, error, words):
    model = tiny("llama")
    fastrot.apply(model, ("R3", "R4"))
    before = fingerprint(model)
    with pytest.raises(error, match=words):
        fastrot.remove(model, groups)
    assert difference(before, fingerprint(model)) == []
