"""Edited records: the same logits bit for bit, or a refusal; never another function."""

import copy
import json
import os
import random
import time

import pytest
import torch
from helpers import logits, random_ids, tiny
from transformers import AutoModelForCausalLM

import fastrot
from fastrot.rotations import KINDS

RUNS = int(os.environ.get("FASTROT_ATTACKS", "5")) * 4
VALUES = (None, True, False, 0, 1, -1, 2, 8, 10**30, 0.5, "", "x", "R4", "input", "output", [], {})
PATTERNS = (
    "re:(a+)+$",
    "re:(.*)*x",
    "re:.*",
    "re:.*mlp.*",
    "Linear",
    "re:(" + "a?" * 50,
    "lm_head",
)


def mutate(node, chance):
    """Change, drop, add or exchange something somewhere inside."""
    places = []

    def walk(node):
        keys = node.keys() if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(node)
    owner, key = chance.choice(places)
    old, edit = owner[key], chance.choice(["value", "drop", "add", "exchange", "flip"])
    if edit == "drop":
        del owner[key]
    elif edit == "add":
        new = chance.choice(VALUES)
        owner.append(new) if isinstance(owner, list) else owner.update({chance.choice("abx"): new})
    elif edit == "exchange":
        other, place = chance.choice(places)
        if type(other[place]) is type(old) and not isinstance(old, (dict, list)):
            owner[key], other[place] = other[place], old
    elif edit == "flip" and isinstance(old, (bool, int)):
        owner[key] = not old if isinstance(old, bool) else old ^ 1
    else:
        owner[key] = chance.choice(PATTERNS if isinstance(old, str) else VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_records(kind, tmp_path):
    model = tiny("llama")
    fastrot.apply(model, ("R1", "R2", "R3", "R4"), transform_type=kind, randomize=True, seed=3)
    model.save_pretrained(tmp_path)
    ids = random_ids(model, 1, 8, seed=0)
    expected = logits(model, ids)
    file = tmp_path / "config.json"
    true = json.loads(file.read_text())
    chance = random.Random(kind)
    refused = 0
    for _ in range(RUNS):
        config = copy.deepcopy(true)
        for _ in range(chance.choice([1, 1, 2, 4])):
            mutate(config["fastrot"], chance)
        file.write_text(json.dumps(config))
        start = time.monotonic()
        try:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(logits(loaded, ids), expected), config["fastrot"]
        except fastrot.RotationError:
            refused += 1
        assert time.monotonic() - start < 30, config["fastrot"]
    assert refused > RUNS // 2
