"""``fastrot.verify`` tells a rotation from anything else, and touches neither model."""

import copy

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
