"""True dimensions: plans of released models, by their configurations, on the meta device."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fastrot
from fastrot.edits import Rotate
from fastrot.mapping import find_architecture
from fastrot.mapping.tables import ARCHITECTURES, SHELLS

CONFIGS = json.loads((Path(__file__).parent / "data" / "released_configs.json").read_text())
ROTATIONS = ("R1", "R2", "R3", "R4")

ODD = {"13696": "107·128", "27392": "107·256"}
"""Intermediate sizes for which no Hadamard matrix is known; a block size is the way out."""

CLASSES = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    | modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
)
UNFIT = {
    *("aya_vision", "chameleon", "cohere_compass", "cohere_compass_text", "deepseek_ocr2"),
    *("dots3_note", "emu3", "granite4_vision", "hunyuan_vl", "lfm2_moe", "ministral"),
    *("qwen3_5", "qwen4_exp", "qwen4_exp_text"),
    # Their picture towers have another width than the language model.
    *("cosmos3_omni", "exaone4_5", "glm_ocr", "janus", "molmo2", "ovis2", "qwen2_vl"),
    "qwen3_omni_moe_thinker",  # heads of 3584 // 28 do not fit a width of 2048
    # They ask for a package that is not installed.
    *("fast_vlm", "gemma3n", "perception_lm"),
}
"""Families whose configuration classes have no defaults of which a model can be built."""

OTHERS = sorted(
    {*ARCHITECTURES, *SHELLS}.intersection(CLASSES, CONFIG_MAPPING)
    - {entry["model_type"] for entry in CONFIGS.values()}
    - UNFIT
)
WAY_OUT = re.compile(r"^(R\d) of .* block sizes that work: (\d+)")


def outline(name):
    """The model without weights."""
    entry = CONFIGS[name]
    if entry["model_type"] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {entry['model_type']}")
    config = CONFIG_MAPPING[entry["model_type"]](**entry["config"])
    return on_meta(entry["model_class"], config)


def on_meta(model_class, config):
    with torch.device("meta"):
        return getattr(transformers, model_class)(config).to("meta")


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", OTHERS)
def test_the_defaults_of_every_other_family(model_type):
    """Of full size, as transformers has them; for a size without a matrix, the block it names."""
    model = on_meta(CLASSES[model_type], CONFIG_MAPPING[model_type]())
    row = find_architecture(model.config)
    possible = [r for r in ROTATIONS if r not in row.refuses and has_place(row, r)]
    for rotation in set(ROTATIONS).difference(possible):
        with pytest.raises(fastrot.UnsupportedRotationError):
            fastrot.plan(model, rotation)
    if model_type == "muse_spark":  # by default all its MLPs are of experts
        with pytest.raises(fastrot.UnsupportedRotationError, match="R4 has no place"):
            fastrot.plan(model, "R4")
        possible.remove("R4")
    # Its dense and its sparse MLPs differ in size, and one has no matrix.
    plan, blocks = None, {"R4": 8} if model_type == "nemotron_h_omni" else {}
    while plan is None:
        try:
            plan = fastrot.plan(model, possible, block_size=blocks or None)
        except fastrot.HadamardSizeError as error:
            rotation, size = WAY_OUT.search(str(error)).groups()
            assert rotation not in blocks
            blocks[rotation] = int(size)
    groups = {
        step.group for edit in plan.weights for step in edit.steps if isinstance(step, Rotate)
    }
    assert groups | {site.group for site in plan.online} == set(possible)


def test_there_are_many():
    """Families, and sizes from small to beyond one machine's memory."""
    sizes = {entry["config"].get("hidden_size") for entry in CONFIGS.values()}
    assert len(CONFIGS) >= 40
    assert len(OTHERS) >= 100
    assert {896, 16384} <= sizes
    assert len({entry["model_type"] for entry in CONFIGS.values()}) >= 60
