"""Classifiers of sequences and of tokens: their head reads what that of a language model reads."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import relative_error
from test_zoo import WithoutCasts, logits
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import FAMILIES, inputs, perturb

import fastrot
from fastrot.cli import main

ROTATIONS = ("R1", "R2", "R3", "R4")
KINDS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
HEADS = {("gpt2", "token"): "classifier"}
"""The names of heads that are not called ``score``."""

EVERY = pytest.mark.parametrize("kind", KINDS)
FOUR = pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt2"])


def classifier(name, kind, dtype=torch.float64, **changes):
    """A model with three classes, and its inputs."""
    family = FAMILIES[name]
    settings = {**family.config, "num_labels": 3, "pad_token_id": 0, **changes}
    config = CONFIG_MAPPING[family.model_type](**settings)
    with torch.random.fork_rng(devices=[]):
        model = KINDS[kind].from_config(config).to(dtype).eval()
    perturb(model, seed=0)
    return model, inputs(family, model)


@EVERY
@FOUR
@pytest.mark.parametrize("keep_head", [False, True], ids=["whole", "between"])
def test_exact(name, kind, keep_head):
    model, given = classifier(name, kind)
    with WithoutCasts():
        before = logits(model, given)
        fastrot.apply(model, ROTATIONS, keep_head=keep_head, precision=torch.float64)
        assert relative_error(logits(model, given), before) <= 1e-12


@EVERY
@FOUR
def test_not_without_the_edits_of_its_head(name, kind):
    model, given = classifier(name, kind)
    before, plan = logits(model, given), fastrot.plan(model, "R1")
    head = f"{HEADS.get((name, kind), 'score')}.weight"
    (edit,) = (edit for edit in plan.weights if edit.parameter == head)
    for i in range(len(edit.steps)):
        left = replace(edit, steps=edit.steps[:i] + edit.steps[i + 1 :])
        changed = copy.deepcopy(model)
        weights = tuple(left if e is edit else e for e in plan.weights)
        fastrot.apply(changed, replace(plan, weights=weights))
        assert relative_error(logits(changed, given), before) > 1e-3, edit.steps[i]


@EVERY
@FOUR
def test_on_disk(name, kind, tmp_path, capsys):
    """Saved and loaded, and rotated without loading, with no padding token."""
    model, given = classifier(name, kind, torch.float32, pad_token_id=None)
    given = {key: value[:1] for key, value in given.items()}
    source, target, saved = (str(tmp_path / part) for part in ("source", "target", "saved"))
    model.save_pretrained(source)
    fastrot.apply(model, ROTATIONS)
    model.save_pretrained(saved)
    assert main(["rotate", source, target, "--rotations", *ROTATIONS]) == 0
    assert capsys.readouterr().out.startswith(f"{type(model).__name__}: R1, R2, R3, R4")
    for folder in (saved, target):
        loaded = KINDS[kind].from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(logits(loaded, given), logits(model, given))
    assert main(["verify", source, target]) == 0
    capsys.readouterr()
    assert main(["verify", source, target, "--full"]) == 0
    places = 4 if kind == "sequence" else 4 * 64
    assert f"the same at {places} of {places} positions" in capsys.readouterr().out
