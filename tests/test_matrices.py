"""Given matrices take every way that seeded ones take: apply, save, load, remove, JSON."""

import copy
import json
import pickle

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot import Recipe, Rotation

ROTATIONS = ("R1", "R2", "R3", "R4")


def orthogonal(n, seed, fixes_ones=False):
    return Rotation("random-matrix", n, seed=seed, label="given", fixes_ones=fixes_ones).operand


def matrices(layers=2, seed=0):
    """One for the stream, one for each layer's values, one for all keys, blocks in the MLP."""
    return {
        "R1": orthogonal(96, seed),
        "R2": [orthogonal(16, seed + 1 + i) for i in range(layers)],
        "R3": orthogonal(16, seed + 20),
        "R4": orthogonal(28, seed + 30),
    }


@pytest.fixture(scope="module")
def pair():
    model = tiny("llama", dtype=torch.float64)
    rotated = copy.deepcopy(model)
    handle = fastrot.apply(rotated, ROTATIONS, matrices=matrices(), precision="float64")
    ids = random_ids(model, 2, 12, seed=1)
    return model, rotated, handle, ids, logits(model, ids)


def test_exact_and_in_the_weights(pair):
    model, rotated, _, ids, before = pair
    assert relative_error(logits(rotated, ids), before) <= 1e-6
    given = matrices()
    name = "model.layers.1.self_attn.v_proj.weight"
    gamma = model.get_parameter("model.layers.1.input_layernorm.weight")
    heads = torch.block_diag(*[given["R2"][1]] * 2)
    expected = heads.T @ (model.get_parameter(name) * gamma) @ given["R1"]
    torch.testing.assert_close(rotated.get_parameter(name), expected, rtol=1e-13, atol=1e-14)
    online = rotated.model.layers[0].mlp.fastrot_down_proj_input
    x = torch.randn(3, 112, dtype=torch.float64)
    torch.testing.assert_close(online(x), x @ torch.block_diag(*[given["R4"]] * 4))


def test_save_load_pickle_and_remove(pair, tmp_path):
    _, rotated, _, ids, before = pair
    rotated.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(loaded, ids), logits(rotated, ids))
    again = pickle.loads(pickle.dumps(loaded))
    fastrot.remove(again)
    assert not any("fastrot" in name for name, _ in again.named_modules())
    assert relative_error(logits(again, ids), before) <= 1e-6
    record = json.loads((tmp_path / "config.json").read_text())["fastrot"]
    groups = record["applied"][0]["transform_config"]["config_groups"]
    assert [len(groups[name]["matrices"]) for name in ROTATIONS] == [1, 2, 1, 1]


def test_another_matrix_in_the_checkpoint_is_refused(pair, tmp_path):
    _, rotated, _, _, _ = pair
    changed = copy.deepcopy(rotated)
    module = changed.model.layers[0].mlp.fastrot_down_proj_input
    module.operand.copy_(orthogonal(28, 77).contiguous().view(torch.int64))
    changed.save_pretrained(tmp_path)
    with pytest.raises(fastrot.RecordError, match=r"R4.*is not the recorded matrix"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with pytest.raises(fastrot.RotationError, match="R4"):
        fastrot.remove(changed)


def test_plans_recipes_and_json(pair):
    model, rotated, handle, _, _ = pair
    recipe = Recipe(ROTATIONS, matrices=matrices(), precision="float64")
    assert recipe == Recipe(ROTATIONS, matrices=matrices(), precision="float64")
    assert recipe != Recipe(ROTATIONS, matrices=matrices(seed=50), precision="float64")
    plan = fastrot.plan(model, recipe)
    assert plan == handle.plan
    data = json.loads(json.dumps(plan.to_dict()))
    again, other = fastrot.Plan.from_dict(data, plan.matrices), copy.deepcopy(model)
    assert again == plan
    fastrot.apply(other, again)
    assert all(map(torch.equal, other.state_dict().values(), rotated.state_dict().values()))
    bare, before = fastrot.Plan.from_dict(data), fingerprint(other := copy.deepcopy(model))
    with pytest.raises(fastrot.RotationError, match=r"is not here.*from_dict\(data, matrices\)"):
        fastrot.apply(other, bare)
    assert difference(before, fingerprint(other)) == []


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "mixtral"])
def test_other_families(name):
    """Through LayerNorms a matrix must fix the ones; behind post-norms it acts online."""
    family = FAMILIES[name]
    model = build(family, torch.float64)
    given = inputs(family, model)
    width = model.config.get_text_config().hidden_size
    centred = name in ("gpt2", "opt")
    with torch.no_grad():
        before = model(**given).logits
        if centred:
            with pytest.raises(fastrot.RotationError, match="all-ones vector"):
                fastrot.plan(model, "R1", matrices={"R1": orthogonal(width, 3)})
        fastrot.apply(model, "R1", matrices={"R1": orthogonal(width, 3, fixes_ones=centred)})
        assert relative_error(model(**given).logits, before) <= max(family.exact, 1e-12)


SQUARE = orthogonal(96, 1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"R1": SQUARE.float()}, ValueError, r"R1: .*not orthogonal, .*more than 1e-12"),
        ({"R1": SQUARE * 1.001}, ValueError, "not orthogonal"),
        ({"R1": SQUARE[:5]}, ValueError, r"square matrix, got \(5, 96\)"),
        ({"R1": SQUARE * float("nan")}, ValueError, "not orthogonal"),
        ({"R1": SQUARE.long()}, TypeError, "floating-point matrix, got torch.int64"),
        ({"R1": "q.pt"}, TypeError, "floating-point matrix, got str"),
        ({"R1": [SQUARE, SQUARE]}, ValueError, "R1 acts on all layers alike"),
        ({"R1": []}, ValueError, "list of R1 is empty"),
        ({"R5": SQUARE}, ValueError, "'R5' is not one of R1, R2"),
        ({"R3": SQUARE}, ValueError, "'R3' is not one of"),
        ({"R1": orthogonal(64, 1)}, ValueError, "does not divide 96"),
        ({"R2": orthogonal(32, 1)}, ValueError, "does not divide head_dim 16"),
        ({"R2": [orthogonal(16, 1)] * 3 + [orthogonal(8, 1)]}, ValueError, "R2 of layer 3"),
        ({"R2": [orthogonal(16, 1)]}, None, None),
        ({"R1": Rotation("hadamard", 96)}, ValueError, "is not a given matrix"),
        (SQUARE, TypeError, "matrices must be a dict"),
    ],
)
def test_refusals(given, error, message):
    model = tiny("llama")
    before = fingerprint(model)
    if error is None:
        fastrot.plan(model, matrices=given)
        return
    with pytest.raises(error, match=message):
        fastrot.apply(model, matrices=given)
    assert difference(before, fingerprint(model)) == []


def test_a_layer_without_a_matrix_and_a_second_block_size_are_refused():
    model = tiny("llama", layers=3)
    with pytest.raises(fastrot.RotationError, match=r"R2: there are 2.*layers.2"):
        fastrot.plan(model, "R2", matrices={"R2": [orthogonal(16, 1), orthogonal(16, 2)]})
    with pytest.raises(fastrot.RotationError, match=r"R2: there are 4.*model.layers has 3"):
        fastrot.plan(model, "R2", matrices={"R2": [orthogonal(16, i) for i in range(4)]})
    with pytest.raises(fastrot.RotationError, match="R4 has order 28, its block_size another"):
        fastrot.plan(model, "R4", matrices={"R4": orthogonal(28, 1)}, block_size={"R4": 16})
    fastrot.plan(model, ("R1", "R4"), matrices={"R4": orthogonal(28, 1)}, block_size=16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda q: q.to("meta"), "R1: .* plain tensor, got one that is on the meta"),
        (lambda q: q.to_sparse(), r"R1: .*torch\.sparse_coo"),
    ],
)
def test_tensors_without_plain_numbers(given, words):
    with pytest.raises(TypeError, match=words):
        Recipe(("R1",), matrices={"R1": given(torch.eye(96, dtype=torch.float64))})


def test_orders_on_meta():
    with pytest.raises(TypeError, match="on the meta device"):
        Rotation.from_permutation(torch.arange(8, device="meta"))


@pytest.mark.parametrize("size", [7, 8])
def test_one_block_size_for_matrices_alone(size):
    """It is theirs, or refused; beside a rotation that has none it is of that."""
    model = tiny("llama")
    alone = {"rotations": ("R1",), "matrices": {"R1": orthogonal(96, 0)}}
    with pytest.raises(fastrot.RotationError, match="R1 has order 96, its block_size another"):
        fastrot.plan(model, **alone, block_size=size)
    assert fastrot.plan(model, **alone, block_size=96) == fastrot.plan(model, **alone)
    both = fastrot.plan(model, **alone | {"rotations": ("R1", "R4")}, block_size=28)
    assert {str(site.rotation.block) for site in both.online} == {"28"}
