"""True dimensions: plans of released models, by their configurations, on the meta device."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fastrot
from fastrot.edits import Rotate
from fastrot.mapping import find_architecture

CONFIGS = json.loads((Path(__file__).parent / "data" / "released_configs.json").read_text())
ROTATIONS = ("R1", "R2", "R3", "R4")

ODD = {"13696": "107·128", "27392": "107·256"}
"""Intermediate sizes for which no Hadamard matrix is known; a block size is the way out."""


def outline(name):
    """The model without weights."""
    entry = CONFIGS[name]
    if entry["model_type"] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {entry['model_type']}")
    config = CONFIG_MAPPING[entry["model_type"]](**entry["config"])
    with torch.device("meta"):
        return getattr(transformers, entry["model_class"])(config)


def has_place(row, rotation):
    mapping = row.mapping
    places = {"R1": mapping.embedding, "R2": mapping.attn_o, "R3": mapping.attn}
    return bool(places.get(rotation, mapping.mlp_out))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_resolves_or_says_why_not(name):
    model = outline(name)
    row = find_architecture(model.config)
    possible = [r for r in ROTATIONS if r not in row.refuses and has_place(row, r)]
    for rotation in set(ROTATIONS).difference(possible):
        with pytest.raises(fastrot.UnsupportedRotationError):
            fastrot.plan(model, rotation)
    size = str(getattr(model.config.get_text_config(), "intermediate_size", None))
    if "R4" in possible and size in ODD:
        with pytest.raises(fastrot.HadamardSizeError, match=f"{size} = {ODD[size]}"):
            fastrot.plan(model, possible)
        plan = fastrot.plan(model, possible, block_size={"R4": 128})
    else:
        plan = fastrot.plan(model, possible)
    groups = {
        step.group for edit in plan.weights for step in edit.steps if isinstance(step, Rotate)
    }
    assert groups | {site.group for site in plan.online} == set(possible)


def test_there_are_many():
    """Families, and sizes from small to beyond one machine's memory."""
    sizes = {entry["config"].get("hidden_size") for entry in CONFIGS.values()}
    assert len(CONFIGS) >= 40
    assert {896, 16384} <= sizes
    assert len({entry["model_type"] for entry in CONFIGS.values()}) >= 60
