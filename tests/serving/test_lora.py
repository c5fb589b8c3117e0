"""LoRA on rotated checkpoints in vLLM: the oracle is the checkpoint with the adapter merged."""

import json

import pytest
import torch
from checkpoints import checkpoint, first
from engine import answers, assert_same, engine, served
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
RANK, ALPHA = 4, 8
RECIPES = {
    "R4": {"rotations": ("R4",), "transform_type": "random-hadamard", "block_size": {"R4": 28}},
    "R1-R4": {
        "rotations": ("R1", "R2", "R3", "R4"),
        "transform_type": "random-matrix",
        "block_size": {"R4": 28},
    },
}


def write_adapter(folder, target):
    """An adapter as PEFT writes it, and the checkpoint ``target`` with it merged, as PEFT does."""
    weights, adapter = load_file(target / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in weights if n.endswith(tuple(f"{t}.weight" for t in TARGETS))]:
        rows, cols = weights[name].shape
        a = 0.3 * torch.randn(RANK, cols, generator=generator)
        b = 0.3 * torch.randn(rows, RANK, generator=generator)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        weights[name] += ALPHA / RANK * b @ a
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest("mine", 1, str(folder))


@pytest.mark.parametrize("recipe", first(*RECIPES))
@pytest.mark.parametrize("ranks", first(1, 2))
def test_as_merged(recipe, ranks, tmp_path, monkeypatch):
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folders = [
        checkpoint(tmp_path / name, "llama", RECIPES[recipe]) for name in ("rotated", "merged")
    ]
    adapter = write_adapter(tmp_path / "adapter", folders[1])
    with engine(folders[0], enable_lora=True, max_lora_rank=8, tensor_parallel_size=ranks) as llm:
        without = answers(llm)
        got = answers(llm, adapter=adapter)
    assert got.tokens != without.tokens
    assert_same(got, served(folders[1]), 1e-4)
