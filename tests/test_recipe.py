"""Recipes and plans are values: made once, equal if they mean the same, carried out as they are."""

import copy
import inspect
import json
from dataclasses import fields, replace

import pytest
import torch
from helpers import difference, fingerprint, tiny
from transformers import LlamaForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot import Recipe, Rotation
from fastrot.edits import Part, Rotate, Scale

ROTATIONS = ("R1", "R2", "R3", "R4")
WANTED = Recipe(ROTATIONS, transform_type="random-hadamard", randomize=True, seed=5)


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_of_shapes_does_what_apply_does(tied):
    model, other = (tiny("llama", tied=tied) for _ in range(2))
    options = {f.name: getattr(WANTED, f.name) for f in fields(WANTED)}
    fastrot.apply(model, **options)
    plan = fastrot.plan(on_meta(other), WANTED)
    assert plan == fastrot.plan(other, **options)
    fastrot.apply(other, plan)
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert model.config.fastrot == other.config.fastrot


def test_a_configuration_is_enough():
    model = tiny("llama", tied=True)
    assert fastrot.plan(model.config, WANTED) == fastrot.plan(model, WANTED)
    vision = build(FAMILIES["llava"], torch.float32)
    assert fastrot.plan(vision.config, "R1") == fastrot.plan(vision, "R1")
    fastrot.apply(model, WANTED)
    with pytest.raises(fastrot.AlreadyRotatedError):
        fastrot.plan(model.config, "R4")
    with pytest.raises(TypeError, match="expected a transformers model, got str"):
        fastrot.plan("path/to/model")


def test_recipes_that_mean_the_same_are_equal():
    row = fastrot.mapping.find_architecture(tiny("llama").config)
    assert Recipe("r1") == Recipe(["R1"]) != Recipe("R2")
    assert Recipe(("R2", "R1")) == Recipe()
    assert Recipe(precision="float32") == Recipe(precision=torch.float32)
    config = fastrot.plan(tiny("llama"), "R4").transform_config
    assert Recipe(transform_config=config.to_dict()) == Recipe(transform_config=config)
    assert Recipe(norm_mappings=list(row.norms)) == Recipe(norm_mappings=row.norms)


@pytest.mark.parametrize("function", [fastrot.plan, fastrot.apply])
def test_signatures_show_the_options(function):
    parameters = inspect.signature(function).parameters
    for field in fields(Recipe):
        assert parameters[field.name].default == field.default
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {"rotation": "R1"}, TypeError, "rotation"),
        ((WANTED,), {"seed": 1}, TypeError, "seed beside a Recipe"),
        ((), {"transform_type": "hadamrd"}, ValueError, "transform type 'hadamrd'"),
        ((), {"seed": 1.0}, TypeError, "seed must be an int"),
        ((), {"learnable": True}, ValueError, "call fastrot.apply.*fastrot.learn"),
    ],
)
def test_options_are_checked_before_the_model_is_read(arguments, options, error, message):
    model = tiny("llama")
    before = fingerprint(model)
    for function in (fastrot.plan, fastrot.apply):
        with pytest.raises(error, match=message):
            function(model, *arguments, **options)
    assert difference(before, fingerprint(model)) == []


def changed(plan, parameter, *steps, **fields):
    edits = [
        replace(e, steps=steps or e.steps, **fields) if e.parameter == parameter else e
        for e in plan.weights
    ]
    return replace(plan, weights=tuple(edits))


DOWN, EMBEDDING = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"
MISFITS = {
    "another size": (
        lambda p: changed(p, DOWN, Rotate(1, Rotation("hadamard", 64), True, "R4")),
        "of size 64",
    ),
    "no such dimension": (
        lambda p: changed(p, DOWN, Rotate(2, Rotation("hadamard", 112), True, "R4")),
        "dimension 2",
    ),
    "a norm of another width": (
        lambda p: changed(p, DOWN, Scale(1, NORM, 0.0)),
        r"\(96,\), expected \(112,\)",
    ),
    "no such norm": (lambda p: changed(p, DOWN, Scale(1, "model.norm.gamma", 0.0)), "no parameter"),
    "parts that do not divide": (
        lambda p: changed(p, DOWN, Rotate(1, Rotation("hadamard", 16), True, "R2", Part(3, 16))),
        "3 parts of 112",
    ),
    "two edits": (lambda p: replace(p, weights=(*p.weights, p.weights[0])), "two edits of"),
    "no such parameter": (
        lambda p: replace(p, shapes={**p.shapes, "model.new.weight": (3,)}),
        "model.new.weight",
    ),
    "another shape": (lambda p: replace(p, shapes={**p.shapes, DOWN: (96, 113)}), "has it as"),
    "no such module": (
        lambda p: replace(p, online=(replace(p.online[0], module="model.layers.7.mlp"),)),
        "model.layers.7.mlp",
    ),
    "another class": (lambda p: replace(p, model_class="QwenForCausalLM"), "was made for a Qwen"),
    "nothing": (lambda p: replace(p, weights=(), online=()), "describes no transform"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_that_does_not_fit_is_refused(name):
    change, message = MISFITS[name]
    model = tiny("llama")
    plan = change(fastrot.plan(model, WANTED))
    before = fingerprint(model)
    for function in (fastrot.check, fastrot.apply):
        with pytest.raises(fastrot.RotationError, match=message):
            function(model, plan)
    assert difference(before, fingerprint(model)) == []


def test_a_plan_for_another_model_is_refused():
    plan = fastrot.plan(tiny("llama", tied=True), WANTED)
    others = {
        "tied in another way": tiny("llama", tied=False),
        "more layers": tiny("llama", tied=True, layers=3),
        "other biases": LlamaForCausalLM(
            replace_config(tiny("llama", tied=True).config, attention_bias=False)
        ),
    }
    for name, model in others.items():
        before = fingerprint(model)
        with pytest.raises(fastrot.RotationError, match="plan this model"):
            fastrot.apply(model, plan)
        assert difference(before, fingerprint(model)) == [], name
    model = tiny("llama", tied=True, seed=3)
    fastrot.apply(model, plan)
    with pytest.raises(fastrot.AlreadyRotatedError):
        fastrot.apply(model, plan)


def replace_config(config, **changes):
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_what_a_plan_of_shapes_can_not_know_is_checked_with_the_weights():
    model = tiny("llama")
    plan = fastrot.plan(on_meta(model), WANTED)
    with pytest.raises(TypeError, match="seed beside a Plan"):
        fastrot.apply(model, plan, seed=1)
    with pytest.raises(TypeError, match="expected a plan"):
        fastrot.check(model, WANTED)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(fastrot.RotationError, match=r"not finite|does not compute"):
        fastrot.apply(model, plan)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "glm4", "deepseek_v3"])
def test_a_plan_is_json(name):
    model = build(FAMILIES[name], torch.float32)
    wanted = [
        r for r in ROTATIONS if r not in fastrot.mapping.find_architecture(model.config).refuses
    ]
    kinds = ("hadamard", "random-hadamard", "random-matrix")
    for kind, randomize in zip(kinds, (False, True, True), strict=True):
        plan = fastrot.plan(model, wanted, transform_type=kind, randomize=randomize, seed=7)
        text = json.dumps(plan.to_dict())
        again = fastrot.Plan.from_dict(json.loads(text))
        assert again == plan
        assert str(again) == str(plan)
        assert len(again.to_dict()["rotations"]) < len(plan.weights)
        assert fastrot.check(model, again) == plan


def test_damaged_json_is_refused_by_name():
    data = fastrot.plan(tiny("llama"), WANTED).to_dict()
    cases = {
        "plan: expected a dict": [],
        "plan: missing seed": without(data, "seed"),
        "plan: unknown surplus": {**data, "surplus": 1},
        "plan: format 2": {**data, "format": 2},
        "plan: seed is True": {**data, "seed": True},
        r"weights\[0\]: parameter is 3": first(data, "weights", parameter=3),
        r"weights\[0\], shape: \[-1\]": first(data, "weights", shape=[-1]),
        r"weights\[0\], steps\[0\]": first(data, "weights", steps=[{"norm": "x"}]),
        r"online\[0\]: there is no rotation 99": first(data, "online", rotation=99),
        "precision=torch.int8": first(data, "online", dtype="torch.int8"),
        "rotation kind": first(data, "rotations", kind="identity"),
        r"norms\[0\]: unknown more": first(data, "norms", more=1),
    }
    for message, damaged in cases.items():
        with pytest.raises(fastrot.RotationError, match=message):
            fastrot.Plan.from_dict(damaged)


def without(data, name):
    return {key: value for key, value in data.items() if key != name}


def first(data, field, **changes):
    return {**data, field: [{**data[field][0], **changes}, *data[field][1:]]}


@pytest.mark.parametrize(
    ("option", "hint"), [("foo", "there are"), ("blocksize", "did you mean block_size")]
)
def test_unknown_options(option, hint):
    with pytest.raises(TypeError, match=f"no option '{option}'; {hint}"):
        fastrot.plan(tiny("llama"), **{option: 1})
