"""The plan as data, and transform configurations in and out."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from test_exact import MODEL_TYPES, ROTATIONS
from zoo import FAMILIES

import fastrot
from fastrot.edits import Rotate, Scale


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_plan_is_what_apply_does(model_type):
    model = tiny(model_type, tied=True)
    plan = fastrot.plan(model, ROTATIONS)
    before = {name: p.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    assert fastrot.apply(model, ROTATIONS).plan == plan
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(plan.parameters)


def test_the_table_names_every_parameter_and_operation():
    model = tiny("qwen2", tied=True)
    plan = fastrot.plan(model, ROTATIONS, transform_type="random-hadamard")
    table = str(plan)
    for name in plan.parameters:
        assert f"  {name} " in table
    assert "untied from model.embed_tokens.weight" in table
    assert "R1 dim 1 (random-hadamard 96); R2 dim 0 (random-hadamard 2x16)" in table
    assert "R4 input (random-hadamard 112)" in table
    assert "model.norm.weight" in table
    assert len(table.splitlines()) == 1 + len(list(plan.rows()))


def calls(function, *args):
    """How many Python functions a call calls."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


def test_planning_is_linear_in_layers():
    with torch.device("meta"):
        models = [tiny("llama", layers=layers) for layers in (8, 16, 32)]
    fastrot.plan(models[0], ROTATIONS)
    few, some, many = (calls(fastrot.plan, model, ROTATIONS) for model in models)
    assert many - some < 2.05 * (some - few)


PLANS = """
import json, sys
import fastrot
from zoo import FAMILIES, build
for name in sys.argv[1:]:
    plan = fastrot.plan(build(FAMILIES[name]), ("R1", "R2", "R3", "R4"), randomize=True)
    print(json.dumps(plan.to_dict()))
"""
MANY_ROLES = ["gemma4_text", "gemma4_experts", "deepseek_v3", "gpt_oss", "llama"]


def test_a_plan_is_the_same_in_every_process():
    known = [name for name in MANY_ROLES if name in FAMILIES]
    here, there = (
        subprocess.Popen(
            [sys.executable, "-c", PLANS, *known],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)]),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1")
    )
    first, second = (process.communicate()[0].splitlines() for process in (here, there))
    assert len(first) == len(known)
    assert first == second


def steps(plan, suffix):
    return [s for e in plan.weights if e.parameter.endswith(suffix) for s in e.steps]


def test_randomize_gives_every_layer_its_own():
    model = tiny("llama", layers=3)
    plan = fastrot.plan(model, ROTATIONS, randomize=True)
    for group, suffix in (("R2", "o_proj.weight"), ("R4", "down_proj.weight")):
        found = [s.rotation for s in steps(plan, suffix) if getattr(s, "group", "") == group]
        assert len({tuple(r.operand.tolist()) for r in found}) == 3
    for location in ("q_attn", "k_cache"):
        found = [site.rotation for site in plan.online if site.location == location]
        assert len({tuple(r.operand.tolist()) for r in found}) == 3
    stream = {s.rotation for e in plan.weights for s in e.steps if getattr(s, "group", "") == "R1"}
    assert len(stream) == 1
    by_module = {}
    for site in plan.online:
        if site.group == "R3":
            by_module.setdefault(site.module, set()).add(site.rotation)
    assert all(len(rotations) == 1 for rotations in by_module.values())


def test_only_what_is_asked_for():
    model = tiny("llama", tied=True)
    assert not fastrot.plan(model, "R3").weights
    plan = fastrot.plan(model, ("R2", "R4"))
    assert not plan.norms
    assert {s.group for e in plan.weights for s in e.steps if isinstance(s, Rotate)} == {"R2", "R4"}
    assert not any(isinstance(s, Scale) for e in plan.weights for s in e.steps)
    fastrot.apply(model, ("R2", "R3", "R4"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_config_is_json_and_comes_back():
    model = tiny("llama")
    twin = copy.deepcopy(model)
    handle = fastrot.apply(model, ROTATIONS, transform_type="random-hadamard", randomize=True)
    config = json.loads(json.dumps(handle.transform_config))
    schemes = config["config_groups"]
    assert set(schemes) == set(ROTATIONS)
    assert set(schemes["R4"]) == {
        "type", "apply", "randomize", "requires_grad", "head_dim", "precision"
    }  # fmt: skip
    assert {a["location"] for s in schemes.values() for a in s["apply"]} == {
        "weight_output", "weight_input", "q_attn", "k_cache", "input"
    }  # fmt: skip
    fastrot.apply(twin, transform_config=config)
    ids = random_ids(model, 2, 12, seed=0)
    assert torch.equal(logits(twin, ids), logits(model, ids))


CUSTOM = {
    "between v and o": [
        {"targets": r"re:.*v_proj$", "location": "weight_output"},
        {"targets": [r"re:.*o_proj$"], "location": "weight_input", "inverse": True},
    ],
    "online and fused input": [
        {"targets": [r"re:.*self_attn\.q_proj$"], "location": "input", "inverse": True},
        {"targets": [r"re:.*self_attn\.q_proj$"], "location": "weight_input"},
    ],
    "fused and online output": [
        {"targets": ["re:.*gate_proj$"], "location": "weight_output"},
        {"targets": ["re:.*gate_proj$"], "location": "output", "inverse": True},
    ],
    "every linear but the head": [
        {"targets": ["Linear"], "ignore": ["lm_head"], "location": "input"},
        {"targets": ["Linear"], "ignore": ["lm_head"], "location": "weight_input", "inverse": True},
    ],
    "heads": [
        {"targets": ["re:.*self_attn$"], "location": "q_attn"},
        {"targets": ["re:.*self_attn$"], "location": "k_cache"},
    ],
}


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
def test_any_transform_on_any_linear(name, kind):
    model = tiny("llama", dtype=torch.float64)
    ids = random_ids(model, 2, 12, seed=0)
    before = logits(model, ids)
    scheme = {"type": kind, "head_dim": 8, "apply": CUSTOM[name], "precision": "torch.float64"}
    handle = fastrot.apply(model, transform_config={"config_groups": {"mine": scheme}})
    assert relative_error(logits(model, ids), before) < 1e-6
    assert handle.plan.weights or handle.plan.online
    if handle.plan.online:
        handle.remove()
        assert relative_error(logits(model, ids), before) < 1e-6


def test_half_a_custom_transform_changes_the_model():
    """Negative control of the test above: the configuration is really carried out."""
    model = tiny("llama", dtype=torch.float64)
    ids = random_ids(model, 2, 12, seed=0)
    before = logits(model, ids)
    half = {
        "type": "hadamard",
        "apply": [{"targets": ["re:.*v_proj$"], "location": "weight_output"}],
    }
    fastrot.apply(model, transform_config={"config_groups": {"half": half}})
    assert relative_error(logits(model, ids), before) > 1e-2


def test_mappings_make_an_unlisted_model_work():
    """A Llama under another name, described by the user; as objects and as dicts."""
    from dataclasses import asdict

    from fastrot.mapping import ARCHITECTURES

    row = ARCHITECTURES["llama"]
    for as_dicts in (False, True):
        model = tiny("llama", dtype=torch.float64, tied=True)
        model.config.model_type = "brand_new"
        ids = random_ids(model, 2, 12, seed=0)
        before = logits(model, ids)
        with pytest.raises(fastrot.UnknownArchitectureError, match="brand_new"):
            fastrot.apply(model)
        fastrot.apply(
            model,
            ROTATIONS,
            mappings=asdict(row.mapping) if as_dicts else row.mapping,
            norm_mappings=[asdict(n) for n in row.norms] if as_dicts else row.norms,
        )
        assert relative_error(logits(model, ids), before) < 1e-6


@pytest.mark.parametrize(("randomize", "distinct"), [(False, 4), (True, 1 + 3 * 4)])
def test_one_decomposition_for_each_distinct_rotation(randomize, distinct, monkeypatch):
    """Sites with the same rotation share its operand; a pickle holds what the sites hold."""
    model = tiny("llama", layers=4)
    done = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: done.append(x.shape) or qr(x))
    handle = fastrot.apply(model, ROTATIONS, transform_type="random-matrix", randomize=randomize)
    assert len(done) == distinct
    places = [s.rotation for s in handle.plan.online]
    assert len(places) > len({id(rotation.operand) for rotation in places})
    tensors = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert len(pickle.dumps(model)) < tensors + 2**20
    assert len(pickle.dumps(handle.plan)) < 2**18


def test_a_pickled_rotation_makes_its_operand_anew():
    rotation = fastrot.Rotation("random-matrix", 12, seed=3, label="R1")
    operand = rotation.operand
    again = pickle.loads(pickle.dumps(rotation))
    assert again == rotation
    assert "operand" not in vars(again)
    assert torch.equal(again.operand, operand)
