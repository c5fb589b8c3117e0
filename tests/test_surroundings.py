"""What stands around a rotation: modes, contexts and books of torch and transformers."""

import copy

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, tiny

import fastrot
from fastrot.online import installed

ALL = ("R1", "R2", "R3", "R4")


def test_kernels_of_the_hub_are_refused_with_online_rotations():
    """They replace whole modules, with what is inside; without online rotations they do no harm."""
    model = tiny("llama")
    model._use_kernels = True
    assert model.use_kernels
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=r"model\.set_use_kernels\(False\)"):
        fastrot.apply(model, ("R2", "R4"))
    assert difference(before, fingerprint(model)) == []
    fastrot.apply(model, ("R1", "R2"))


@pytest.mark.parametrize("transform_type", ["random-hadamard", "random-matrix"])
def test_autocast_around_a_rotation_changes_no_bit(transform_type):
    """Dense rotations are matrix products, which autocast would round to 16 bits in float32."""
    model = tiny("llama")
    twin = copy.deepcopy(model)
    recipe = fastrot.Recipe(ALL, transform_type=transform_type, precision="float32")
    fastrot.apply(model, recipe)
    with torch.autocast("cpu", torch.bfloat16):
        fastrot.apply(twin, recipe)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_autograd_knows_that_weights_were_written():
    """Saved by a forward before, they are refused in a backward after: else a wrong gradient."""
    model = tiny("llama")
    versions = {name: p._version for name, p in model.named_parameters()}
    plan = fastrot.plan(model, ("R1", "R2"))
    loss = model(random_ids(model, 1, 5, seed=0)).logits.sum()
    fastrot.apply(model, plan)
    for name, parameter in model.named_parameters():
        assert (parameter._version > versions[name]) == (name in plan.parameters), name
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("training", [True, False])
def test_online_modules_have_the_mode_of_the_model(training):
    model = tiny("llama").train(training)
    fastrot.apply(model, ALL)
    found = [rotation for *_, rotation in installed(model)]
    assert found
    assert all(rotation.training == training for rotation in found)
    assert all(module.training == training for module in model.modules())


def test_weights_that_were_untied_stay_apart(tmp_path):
    """In every book that transformers keeps: a second tying would undo the rotation of the head."""
    model = tiny("llama", tied=True)
    ids = random_ids(model, 1, 9, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, ("R1",))
    assert not model.all_tied_weights_keys
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.allclose(logits(model, ids), expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_weights_that_stay_tied_are_one_still():
    model = tiny("llama", tied=True)
    fastrot.apply(model, ("R2", "R4"))
    assert model.all_tied_weights_keys
    assert model.lm_head.weight is model.model.embed_tokens.weight
