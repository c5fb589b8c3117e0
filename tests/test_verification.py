"""``fastrot.verify`` tells a rotation from anything else, and touches neither model."""

import copy

import numpy as np
import pytest
import torch
from helpers import difference, fingerprint, random_ids, tiny

import fastrot

ROTATIONS = ("R1", "R2", "R3", "R4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_rotation_is_verified_and_its_absence_is_not(dtype):
    model = tiny("llama", dtype=dtype, heads=4, head_dim=32, hidden=128, intermediate=256)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, ROTATIONS, transform_type="random-hadamard")
    before = fingerprint(model), fingerprint(rotated)
    prompts = [random_ids(model, 2, 9, seed=4)]
    result = fastrot.verify(model, rotated, prompts)
    assert result
    assert result.error <= result.tolerance < 0.1
    assert result.positions == 4 * 64 + 2 * 9
    assert "verified: the same function" in str(result)
    assert difference(before[0], fingerprint(model)) == []
    assert difference(before[1], fingerprint(rotated)) == []
    fastrot.remove(rotated, "R3")
    assert fastrot.verify(model, rotated)
    with torch.no_grad():
        rotated.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    wrong = fastrot.verify(model, rotated)
    assert not wrong
    assert "FAILED" in str(wrong)
    assert fastrot.verify(model, rotated, tolerance=1.0)


def test_what_can_not_be_compared_is_refused():
    model = tiny("llama")
    with pytest.raises(fastrot.RotationError, match="vocabulary of 64, the rotated model of 65"):
        fastrot.verify(model, tiny("llama", vocab=65))
    with pytest.raises(fastrot.RotationError, match="token 64"):
        fastrot.verify(model, model, [torch.tensor([[64]])])
    with pytest.raises(fastrot.RotationError, match="precision=bfloat16"):
        fastrot.verify(model, model, precision="bfloat16")
    with pytest.raises(TypeError, match="expected a transformers model"):
        fastrot.verify(model, "path")


def test_dropout_hides_nothing():
    """In train mode, too, damage is found and a rotation verified, by the numbers of eval mode."""
    model = tiny("llama", attention_dropout=0.3).train()
    model.model.layers[0].eval()
    rotated, damaged = copy.deepcopy(model), copy.deepcopy(model)
    fastrot.apply(rotated, ROTATIONS)
    with torch.no_grad():
        damaged.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    flags = [[module.training for module in each.modules()] for each in (model, rotated, damaged)]
    state = torch.get_rng_state()
    found = fastrot.verify(model, rotated), fastrot.verify(model, damaged)
    assert (bool(found[0]), bool(found[1])) == (True, False)
    with pytest.raises(fastrot.RotationError, match="token 64"):
        fastrot.verify(model, rotated, [torch.tensor([[64]])])
    assert torch.equal(torch.get_rng_state(), state)
    after = [[module.training for module in each.modules()] for each in (model, rotated, damaged)]
    assert after == flags
    assert any(flags[0])
    assert not all(flags[0])
    plain = model.eval(), rotated.eval(), damaged.eval()
    assert found == (fastrot.verify(plain[0], plain[1]), fastrot.verify(plain[0], plain[2]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": torch.arange(4)[None]}, ValueError, r"prompt 0 has the shape \(4,\); give a"),
        ({"prompts": [torch.zeros(1, 0).long()]}, ValueError, r"0 has the shape \(1, 0\); give"),
        ({"prompts": [torch.ones(1, 2).long(), [[1, 2]]]}, TypeError, r"prompt 1 .* got \[\[1, 2"),
        ({"prompts": ["hi"]}, TypeError, "prompt 0 must hold token ids, got 'hi'"),
        ({"prompts": "hi"}, TypeError, "prompts must hold token ids, got 'hi'"),
        ({"prompts": 5}, TypeError, "prompts must hold token ids, got 5"),
        ({"prompts": [torch.ones(1, 2)]}, TypeError, "prompt 0 .* got torch.float32"),
        ({"tolerance": "x"}, TypeError, "tolerance must be a number .* got 'x'"),
        ({"tolerance": -1}, ValueError, "tolerance=-1 is negative"),
        ({"tolerance": float("nan")}, ValueError, "tolerance=nan is negative or no number"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
        ({"seed": "0"}, TypeError, "seed must be an int, got '0'"),
    ],
)
def test_arguments_are_refused_before_a_model_runs(arguments, error, message, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(error, match=message):
        fastrot.verify(model, model, **arguments)


def test_whole_numbers_of_numpy_are_seeds():
    """They were searched for among all seeds, one by one."""
    model = tiny("llama")
    assert fastrot.verify(model, model, seed=np.int64(3)) == fastrot.verify(model, model, seed=3)
    recipe = fastrot.Recipe(seed=np.int64(3))
    assert recipe == fastrot.Recipe(seed=3)
    assert type(recipe.seed) is int
