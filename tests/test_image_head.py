"""Janus draws: a second head reads the stream, and an aligner writes what it said back into it."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import relative_error
from test_zoo import WithoutCasts
from zoo import FAMILIES, build

import fastrot

JANUS = FAMILIES["janus"]
SETTINGS = {"transform_type": "random-hadamard", "precision": torch.float64}


@torch.no_grad()
def drawn(model):
    """What the image head says after some text and some codes of a picture."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(*JANUS.ids, (2, 5), generator=generator)
    codes = torch.randint(0, 8, (2, 4), generator=generator)
    picture = model.prepare_embeddings_for_image_generation(codes)
    embeds = torch.cat([model.get_input_embeddings()(ids), picture], dim=1)
    with WithoutCasts():
        states = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        return model.model.generation_head(states)


@pytest.mark.parametrize("keep_head", [False, True])
def test_it_draws_the_same(keep_head):
    model = build(JANUS)
    before = drawn(model)
    fastrot.apply(model, ("R1", "R2", "R3", "R4"), keep_head=keep_head, **SETTINGS)
    assert relative_error(drawn(model), before) <= 1e-12


@pytest.mark.parametrize("name", JANUS.unread)
def test_not_without_its_own_edits(name):
    model = build(JANUS)
    before, plan = drawn(model), fastrot.plan(model, "R1", **SETTINGS)
    rest = tuple(edit for edit in plan.weights if not edit.parameter.endswith(name))
    assert len(rest) == len(plan.weights) - 1
    changed = copy.deepcopy(model)
    fastrot.apply(changed, replace(plan, weights=rest))
    assert relative_error(drawn(changed), before) > 1e-3


@pytest.mark.parametrize("setting", ["vision_config.depth", "vq_config.num_hidden_layers"])
@pytest.mark.parametrize("layers", [1, 3])
def test_an_aligner_with_another_last_layer_is_refused(setting, layers):
    with pytest.raises(fastrot.RotationError, match=rf"knows janus models.* {setting}={layers}"):
        fastrot.plan(build(JANUS, **{setting: layers}), "R1")
