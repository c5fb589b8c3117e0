"""A state loads into a rotated model as one with the same rotations saved it, or not at all."""

import copy

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from safetensors.torch import load, load_file, save, save_file
from transformers import AutoModelForCausalLM

import fastrot
from fastrot.online import installed
from fastrot.rotations import KINDS


@pytest.fixture(scope="module")
def plain():
    return tiny("llama", dtype=torch.float64)


def rotated(plain, **options):
    model = copy.deepcopy(plain)
    fastrot.apply(model, "R4", **options)
    return model


def mean_with_itself(value):
    return (value + value) / 2


def cast(value):
    return value.bfloat16()


def halved(value):
    return (value * 0.5).to(value.dtype)


def bits_halved(value):
    return value // 2


def longer(value):
    return torch.cat([value, value])


@pytest.mark.parametrize("change", [mean_with_itself, cast, halved, bits_halved, longer])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_operand_is_refused_and_the_own_one_kept(kind, change, plain):
    model = rotated(plain, transform_type=kind)
    before = {id(r): r.operand.clone() for *_, r in installed(model)}
    state = {
        name: change(value) if "fastrot_" in name else value
        for name, value in model.state_dict().items()
    }
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.fastrot_.*operand of R4"):
        model.load_state_dict(state)
    assert all(torch.equal(r.operand, before[id(r)]) for *_, r in installed(model))


OTHERS = {
    "block": ({"block_size": {"R4": 16}}, {}),
    "seed": (
        {"transform_type": "random-hadamard", "seed": 1},
        {"transform_type": "random-hadamard"},
    ),
    "matrix": ({"transform_type": "random-matrix", "seed": 1}, {"transform_type": "random-matrix"}),
    "kind": ({"transform_type": "random-hadamard"}, {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_rotation_is_refused(other, plain):
    there, here = (rotated(plain, **options) for options in OTHERS[other])
    before = copy.deepcopy([r.operand for *_, r in installed(here)])
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.fastrot_.*operand of R4"):
        here.load_state_dict(there.state_dict())
    assert all(
        torch.equal(a, r.operand) for a, (*_, r) in zip(before, installed(here), strict=True)
    )


def through_a_file(state):
    return load(save({name: value.contiguous() for name, value in state.items()}))


def older(state):
    """What was saved when the marker of ``hadamard`` said nothing."""
    return {
        n: torch.ones(1, dtype=torch.int8) if v.dtype == torch.int32 else v
        for n, v in state.items()
    }


@pytest.mark.parametrize("route", [dict, through_a_file, older])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_the_same_rotation_loads(kind, route, assign, plain):
    model, other = (rotated(plain, transform_type=kind) for _ in range(2))
    ids = random_ids(plain, 2, 12, seed=0)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    bare = copy.deepcopy(model).to_empty(device="cpu")
    targets = [other, bare, *([copy.deepcopy(model).to("meta")] if assign else [])]
    for target in targets:
        target.load_state_dict(route(model.state_dict()), assign=assign)
        pairs = zip(installed(target), installed(model), strict=True)
        assert all(torch.equal(a.operand, b.operand) for (*_, a), (*_, b) in pairs)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_an_unsaid_marker_of_a_checkpoint_is_read(plain, tmp_path):
    model = rotated(plain)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(older(load_file(file)), file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = random_ids(plain, 2, 12, seed=0)
    assert relative_error(logits(loaded, ids), logits(plain, ids)) < 1e-12


@pytest.mark.parametrize("said", [16, -48, 1])
def test_another_marker_in_a_checkpoint_is_refused(said, plain, tmp_path):
    rotated(plain).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for name in [name for name in state if "fastrot_" in name]:
        state[name].fill_(said)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(fastrot.RecordError, match=rf"operand of R4, .* says {said}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
