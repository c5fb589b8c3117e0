"""Channels change places before R4: the same function, or a refusal that says why not."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import difference, fingerprint, relative_error, tiny
from test_checkpoint_rotate import tensors
from test_zoo import logits, original
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot import Rotation
from fastrot.mapping import find_architecture

SOME = ("llama", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "gemma3_text", "bitnet", "mixtral")
REFUSED = {"bitnet": "ffn_sub_norm", "mixtral": "not in an MLP of linear modules"}
EVERY = [n if n in SOME else pytest.param(n, marks=pytest.mark.exhaustive) for n in FAMILIES]


def orders(model, seed=0):
    """One for each layer."""
    generator = torch.Generator().manual_seed(seed)
    width = fastrot.plan(model, "R4").online[0].rotation.size
    count = model.config.get_text_config().num_hidden_layers
    return [torch.randperm(width, generator=generator) for _ in range(count)]


@pytest.fixture
def pair():
    """A model, and it permuted and rotated in blocks."""
    model = tiny("llama", dtype=torch.float64)
    recipe = fastrot.Recipe(
        ("R1", "R2", "R4"),
        permutations={"R4": orders(model)},
        block_size={"R4": 28},
        precision="float64",
    )
    rotated = copy.deepcopy(model)
    return model, rotated, fastrot.apply(rotated, recipe), recipe


def ids_of(model):
    return {"input_ids": torch.arange(24).view(2, 12) % model.config.vocab_size}


@pytest.mark.parametrize("name", EVERY)
def test_exact_or_refused(name):
    model, given, before = original(name)
    rotated = copy.deepcopy(model)
    fresh = fingerprint(rotated)
    try:
        fastrot.apply(rotated, "R4", permutations={"R4": orders(model)}, precision="float64")
    except fastrot.UnsupportedRotationError as refusal:
        why = str(refusal)
    else:
        why = ""
    if why:
        assert name not in SOME or REFUSED[name] in why
        assert difference(fresh, fingerprint(rotated)) == []
        return
    assert relative_error(logits(rotated, given), before) <= FAMILIES[name].exact


def test_it_is_what_it_says(pair):
    """In the weights, with the matrices written out."""
    model, rotated, handle, recipe = pair
    mlp, turned = model.model.layers[1].mlp, rotated.model.layers[1].mlp
    order = recipe.permutations["R4"][1].operand
    gamma = model.model.layers[1].post_attention_layernorm.weight
    r1 = Rotation("hadamard", 96).matrix()
    blocks = Rotation("hadamard", 112, 28).matrix()
    expected = (mlp.up_proj.weight * gamma)[order] @ r1
    torch.testing.assert_close(turned.up_proj.weight, expected, rtol=1e-13, atol=1e-14)
    expected = r1.T @ mlp.down_proj.weight[:, order] @ blocks
    torch.testing.assert_close(turned.down_proj.weight, expected, rtol=1e-13, atol=1e-14)
    assert [*handle.plan.transform_config.config_groups] == ["P4", "R1", "R2", "R4"]


def test_every_edit_matters(pair):
    model, _, handle, _ = pair
    ids = ids_of(model)
    before = logits(model, ids)
    permuted = [edit for edit in handle.plan.weights if "P4" in edit.groups]
    assert len(permuted) == 5 * 2  # three weights and two biases
    for edit in permuted:
        kept = tuple(s for s in edit.steps if getattr(s, "group", "") != "P4")
        weights = [replace(e, steps=kept) if e is edit else e for e in handle.plan.weights]
        wrong = copy.deepcopy(model)
        fastrot.apply(wrong, replace(handle.plan, weights=tuple(weights)))
        assert relative_error(logits(wrong, ids), before) > 1e-3


def test_save_load_json_and_remove(pair, tmp_path):
    model, rotated, handle, recipe = pair
    ids = ids_of(model)
    plan = handle.plan
    data = json.loads(json.dumps(plan.to_dict()))
    assert fastrot.Plan.from_dict(data, plan.matrices) == plan == fastrot.plan(model, recipe)
    bare, other = fastrot.Plan.from_dict(data), copy.deepcopy(model)
    with pytest.raises(fastrot.RotationError, match=r"the permutation .* is not here"):
        fastrot.apply(other, bare)
    rotated.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(loaded, ids), logits(rotated, ids))
    fastrot.remove(loaded)  # R4, which came last; the channels stay where they are
    assert relative_error(logits(loaded, ids), logits(model, ids)) <= 1e-6


def test_streamed(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16, layers=3, tied=True)
    recipe = fastrot.Recipe(
        ("R1", "R2", "R3", "R4"), permutations={"R4": orders(model)}, block_size={"R4": 16}
    )
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", recipe, memory=1 << 20)
    fastrot.apply(model, recipe)
    model.save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    expected, got = tensors(tmp_path / "whole"), tensors(tmp_path / "target")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


ORDER = torch.arange(112)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"R4": ORDER.clamp(max=110)}, ValueError, "every number from 0 to 111 once"),
        ({"R4": ORDER[1:]}, ValueError, "every number from 0 to 110 once"),
        ({"R4": ORDER.double()}, TypeError, "a row of whole numbers, got .*float64"),
        ({"R4": ORDER.view(2, 56)}, TypeError, r"a row of whole numbers, got \(2, 56\)"),
        ({"R4": []}, ValueError, "list of R4 is empty"),
        ({"R4": torch.arange(96)}, ValueError, "has 112 channels, the order 96"),
        ({"R4": [ORDER, torch.arange(96)]}, ValueError, "R4 of layer 1"),
        ({"R4": [ORDER] * 3}, ValueError, "there are 3.*model.layers has 2"),
        ({"R4": torch.eye(112)}, TypeError, "a row of whole numbers"),
        ({"R4": Rotation("hadamard", 112)}, ValueError, "is not a given permutation"),
        ({"R1": torch.arange(96)}, ValueError, "R1 takes none; a matrix of your own"),
        ({"R3": ORDER}, ValueError, "'R3' is not one of R1, R4"),
        (ORDER, TypeError, "permutations must be a dict such as {'R4': order}"),
    ],
)
def test_refused_and_untouched(given, error, message):
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        fastrot.apply(model, ("R1", "R4"), permutations=given)
    assert difference(before, fingerprint(model)) == []


def test_a_row_of_numbers_is_one_order():
    recipe = fastrot.Recipe("R4", permutations={"r4": ORDER.flip(0).tolist()})
    assert recipe == fastrot.Recipe("R4", permutations={"R4": ORDER.flip(0)})
    assert recipe.permutations["R4"][0].matrix()[111, 0] == 1


def test_it_acts_in_weights_alone():
    group = {
        "type": "permutation",
        "matrices": ["a"],
        "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}],
    }
    with pytest.raises(fastrot.RotationError, match="acts in weights alone, not at input"):
        fastrot.apply(tiny("llama"), transform_config={"config_groups": {"P4": group}})


def scaled(_, __, output):
    return output * torch.linspace(1, 2, output.shape[-1])


class Activation(torch.nn.Module):
    """As SiLU, but every channel has its own factor, or its own group."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        x = torch.nn.functional.silu(x)
        if self.factors is None:
            groups = x.unflatten(-1, (4, -1))
            return (groups / groups.abs().amax(-1, keepdim=True)).flatten(-2)
        return x * self.factors.flatten()


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: mlp.act_fn.register_forward_hook(scaled),
        lambda mlp: setattr(mlp, "act_fn", Activation(torch.linspace(1, 2, 112))),
        lambda mlp: setattr(
            mlp, "act_fn", Activation(torch.nn.Parameter(torch.linspace(1, 2, 112).view(4, 28)))
        ),
        lambda mlp: setattr(mlp, "act_fn", Activation(None)),
    ],
    ids=["hook", "tensor", "parameter", "groups"],
)
def test_what_stands_between_is_looked_at(change):
    """R4 alone does not mind it: it acts on what goes into the down projection."""
    model = tiny("llama")
    change(model.model.layers[1].mlp)
    before, given = logits(model, ids_of(model)), {"R4": ORDER.flip(0)}
    fresh = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=r"act_fn|factors"):
        fastrot.apply(model, "R4", permutations=given)
    assert difference(fresh, fingerprint(model)) == []
    fastrot.apply(model, "R4")
    assert relative_error(logits(model, ids_of(model)), before) < 1e-5


def test_gate_and_up_in_one_matrix_by_the_table_alone():
    family = FAMILIES["phi3"]
    model = build(family, torch.float32)
    row = find_architecture(model.config)
    options = {"mappings": row.mapping, "norm_mappings": row.norms}
    order = orders(model)
    with pytest.raises(fastrot.UnsupportedRotationError, match=r"gate_up_proj has \d+ channels"):
        fastrot.apply(model, "R4", permutations={"R4": order}, **options)
    fastrot.apply(model, "R4", permutations={"R4": order})


def test_a_second_order_is_refused_by_its_name(pair):
    _, rotated, _, recipe = pair
    fastrot.remove(rotated)
    before = logits(rotated, ids_of(rotated))
    with pytest.raises(fastrot.AlreadyRotatedError, match=r"changed places already.*order stays"):
        fastrot.apply(rotated, "R4", permutations=recipe.permutations)
    fastrot.apply(rotated, "R4", block_size={"R4": 28}, precision="float64")
    assert relative_error(logits(rotated, ids_of(rotated)), before) < 1e-6


def test_a_plan_takes_what_has_the_digest(pair):
    _, _, handle, _ = pair
    data, given = handle.plan.to_dict(), handle.plan.matrices
    first, second = given
    for wrong in ({first: given[second], second: given[first]}, {first: torch.eye(112).double()}):
        with pytest.raises(fastrot.RotationError, match="has another digest"):
            fastrot.Plan.from_dict(data, {**given, **wrong})
