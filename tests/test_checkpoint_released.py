"""Released models of full size: every tensor of a checkpoint is accounted for, from headers."""

import re
from math import prod
from pathlib import Path

import pytest
import torch
from test_released import outline
from transformers.core_model_loading import revert_weight_conversion

import fastrot
from fastrot.checkpoint.drafts import DRAFT
from fastrot.checkpoint.header import Entry
from fastrot.checkpoint.tasks import tasks_of
from fastrot.checkpoint.trace import trace
from fastrot.mapping.tables import find_architecture

pytestmark = pytest.mark.slow

MODELS = {
    "meta-llama/Llama-3.1-70B": ("R1", "R2", "R3", "R4"),
    "mistralai/Mixtral-8x7B-v0.1": ("R1", "R2", "R3", "R4"),
    "Qwen/Qwen3-235B-A22B": ("R1", "R2", "R3", "R4"),
    "deepseek-ai/DeepSeek-V3": ("R1", "R2", "R4"),
    "openai/gpt-oss-120b": ("R1", "R2", "R3", "R4"),
    "google/gemma-3-27b-pt": ("R1", "R2", "R3", "R4"),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("R1", "R4"),
}
DRAFTS = {
    "deepseek-ai/DeepSeek-V3": "model.layers.61.eh_proj.weight",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "mtp.fc.weight",
}


def headers(model):
    """What ``save_pretrained`` would write, names and shapes."""
    ties = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ties}
    file = Path("model.safetensors")
    return {
        name: Entry(tuple(tensor.shape), torch.bfloat16, name, file, 0)
        for name, tensor in revert_weight_conversion(model, state).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_accounted_for(name):
    model = outline(name)
    entries = headers(model)
    draft = DRAFTS.get(name)
    if draft is not None:
        assert DRAFT.search(draft)
        width = model.config.hidden_size
        entries[draft] = Entry((width, 2 * width), torch.bfloat16, draft, Path("x"), 0)
    row = find_architecture(model.config)
    rotations = tuple(r for r in MODELS[name] if r not in row.refuses)
    assert "R1" in rotations
    plan = fastrot.plan(model, rotations)
    made = trace(model, entries)
    assert made.unknown == ([draft] if draft else [])
    known = {name: entry for name, entry in entries.items() if name != draft}
    tasks, equal = tasks_of(model, plan, made, known)
    assert not equal
    assert {task.name for task in tasks} >= set(known)
    # Every number that a step touches in the plan, a step touches in a file.
    steps = sum(len(edit.steps) * prod(plan.shapes[edit.parameter]) for edit in plan.weights)
    local = sum(
        len(action.edit.steps) * prod(s.stop - s.start for s in action.box)
        for task in tasks
        for action in task.actions
        if action.edit is not None
    )
    parts = any(re.search("values of", str(step)) for e in plan.weights for step in e.steps)
    assert local == steps or parts
    filled = sum(1 for task in tasks for action in task.actions if action.edit is None)
    assert filled == len(plan.written_norms)
