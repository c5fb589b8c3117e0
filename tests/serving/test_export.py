"""vLLM serves what was exported without fastrot: the oracle is the unrotated checkpoint there."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import checkpoint, first
from compressed_tensors.transform import TransformConfig
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from engine import Answers, assert_same, served
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm.config import ModelConfig

import fastrot
from fastrot.integrations.vllm.config import FastrotConfig
from fastrot.integrations.vllm.start import check_start

RECIPES = {
    "hadamard": {"rotations": ("R1", "R2", "R4"), "block_size": {"R4": 32}},
    "random-hadamard": {
        "rotations": ("R1", "R4"),
        "transform_type": "random-hadamard",
        "randomize": True,
        "block_size": {"R4": 56},
    },
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return served(checkpoint(tmp_path_factory.mktemp("plain"), "llama", mlp_bias=False))


def exported(folder, kind):
    checkpoint(folder / "rotated", "llama", RECIPES[kind], mlp_bias=False)
    fastrot.export(folder / "rotated", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("kind", first(*RECIPES))
def test_vllm_alone_answers_as_the_original(kind, plain, tmp_path):
    script = Path(__file__).with_name("stock.py")
    call = [sys.executable, script, exported(tmp_path, kind)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kinds"] == [kind, kind]
    assert said["without"] != plain.tokens
    got = Answers(said["tokens"], torch.tensor(said["logprobs"]), torch.tensor(said["scores"]))
    assert_same(got, plain)


@pytest.mark.parametrize("kind", RECIPES)
def test_compressed_tensors_reads_the_transforms(kind, tmp_path):
    folder = exported(tmp_path, kind)
    settings = json.loads((folder / "config.json").read_text())
    read = TransformConfig.model_validate(settings["quantization_config"]["transform_config"])
    assert {scheme.type for scheme in read.config_groups.values()} == {kind}
    if kind == "hadamard":
        matrix = load_file(folder / "model.safetensors")[
            "model.layers.0.mlp.down_proj.R4_input.weight"
        ]
        assert torch.equal(matrix, deterministic_hadamard_matrix(32, torch.float32))


def test_transformers_does_not_load_it(tmp_path):
    folder = exported(tmp_path, "hadamard")
    with pytest.raises(fastrot.RecordError, match=r"load the checkpoint that it was exported from"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_plugin_leaves_it_to_vllm(kind, tmp_path):
    folder = exported(tmp_path, kind)
    config = ModelConfig(str(folder), skip_tokenizer_init=True)
    assert config.quantization == "compressed-tensors"
    check_start(config, SimpleNamespace(tensor_parallel_size=1))
    settings = config.hf_config.quantization_config
    assert FastrotConfig.override_quantization_method(settings, None, config.hf_config) is None
    del settings["transform_config"]
    took = FastrotConfig.override_quantization_method(settings, None, config.hf_config)
    assert took == "fastrot"
    with pytest.raises(fastrot.RotationError, match="would leave them out"):
        check_start(config, SimpleNamespace(tensor_parallel_size=1))
