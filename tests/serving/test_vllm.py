"""vLLM serves what fastrot rotated: the oracle is the unrotated checkpoint in the same server."""

import json
from types import SimpleNamespace

import pytest
from checkpoints import EXPERTS, checkpoint, first, model
from engine import answers, assert_same, distance, engine, rotations, served, without
from quantized import quantize
from torch import nn
from vllm import LLM
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

import fastrot
from fastrot.integrations.vllm.config import FastrotConfig
from fastrot.integrations.vllm.experts import rotate_experts
from fastrot.integrations.vllm.recorded import recorded_sites

ALL = ("R1", "R2", "R3", "R4")
RECIPES = {
    "llama": {
        "rotations": ("R3", "R4"),
        "transform_type": "random-hadamard",
        "block_size": {"R4": 56},
    },
    "qwen3": {"rotations": ALL},
    "qwen2": {"rotations": ALL, "randomize": True, "seed": 3},
    "mistral": {"rotations": ALL, "transform_type": "random-matrix"},
}
EXPERT_RECIPES = {
    "mixtral": {"rotations": ALL, "transform_type": "random-matrix", "block_size": {"R4": 56}},
    "qwen3_moe": {
        "rotations": ALL,
        "transform_type": "random-hadamard",
        "block_size": {"R4": 16},
    },
}
PLACES = {"fastrot_input": 2, "fastrot_q_attn": 2, "fastrot_k_cache": 2}


@pytest.mark.parametrize("family", first("qwen3", "llama", "qwen2", "mistral"))
def test_the_same_tokens_and_log_probabilities(family, plain, tmp_path):
    folder = checkpoint(tmp_path, family, RECIPES[family])
    with engine(folder) as llm:
        assert llm.apply_model(rotations) == [PLACES]
        assert_same(answers(llm), plain(family))
        for place in PLACES:
            assert without(llm, place).tokens != plain(family).tokens
        assert_same(answers(llm), plain(family))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", EXPERTS)
def test_inside_experts(family, plain, tmp_path):
    with engine(checkpoint(tmp_path, family, EXPERT_RECIPES[family])) as llm:
        [places] = llm.apply_model(rotations)
        assert places["fastrot_down_input"] == 2
        assert_same(answers(llm), plain(family))
        assert without(llm, "fastrot_down_input").tokens != plain(family).tokens


@pytest.mark.exhaustive
def test_inside_experts_compiled_on_two_ranks(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = checkpoint(tmp_path, "qwen3_moe", EXPERT_RECIPES["qwen3_moe"])
    assert_same(served(folder, enforce_eager=False, tensor_parallel_size=2), plain("qwen3_moe"))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"method": object()}, r"they are quantized \(object\)"),
        ({"unquantized_backend": UnquantizedMoeBackend.TRITON}, "vLLM computes them by TRITON"),
        ({"activation": MoEActivation.SWIGLUOAI}, "their activation 'swigluoai'"),
        ({"use_ep": True}, "expert parallelism is on"),
    ],
)
def test_experts_that_are_one_call_are_refused(changed, problem):
    tiny = model("mixtral")
    fastrot.apply(tiny, ("R4",))
    site = recorded_sites(tiny.config)[0]
    layer = SimpleNamespace(activation=MoEActivation.SILU, use_ep=False)
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    nn.Module.__init__(method)
    method.unquantized_backend = UnquantizedMoeBackend.CPU
    rotate_experts(layer, method, site)
    for name, value in changed.items():
        setattr(layer if hasattr(layer, name) else method, name, value)
    method = changed.get("method", method)
    match = f"inside the experts of model.layers.0.block_sparse_moe.experts: {problem}"
    with pytest.raises(fastrot.RotationError, match=match):
        rotate_experts(layer, method, site)


@pytest.mark.exhaustive
def test_fused_rotations_need_no_plugin(plain, tmp_path):
    recipe = {"rotations": ("R1", "R2"), "transform_type": "random-hadamard"}
    assert_same(served(checkpoint(tmp_path, "llama", recipe)), plain("llama"))


def test_a_rotation_that_no_layer_takes_stops_the_start(tmp_path, capfd):
    scheme = {
        "type": "hadamard",
        "apply": [
            {"targets": ["re:.*q_proj$"], "location": "input"},
            {"targets": ["re:.*q_proj$"], "location": "weight_input", "inverse": True},
        ],
    }
    recipe = {"transform_config": {"config_groups": {"mine": scheme}}}
    with pytest.raises(RuntimeError), engine(checkpoint(tmp_path, "llama", recipe)):
        pass
    message = "can't rotate the input of model.layers.0.self_attn.q_proj online (mine, 2 such"
    assert message in "".join(capfd.readouterr())


def test_what_is_refused_before_a_worker_starts(tmp_path):
    folder = checkpoint(tmp_path, "llama", {"rotations": ("R4",)})
    with pytest.raises(ValueError, match=r"n one of 2, 4, 8, 16, 28, 56, 112, or") as error:
        LLM(str(folder), tensor_parallel_size=2, skip_tokenizer_init=True)
    assert "R4 of model.layers.0.mlp.down_proj has blocks of 224" in str(error.value)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has online rotations, but quantization is None"):
        LLM(str(folder), skip_tokenizer_init=True)


@pytest.mark.exhaustive
def test_tensor_parallelism_of_whole_blocks(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = checkpoint(tmp_path, "llama", RECIPES["llama"])
    with engine(folder, tensor_parallel_size=2) as llm:
        assert llm.apply_model(rotations) == [PLACES, PLACES]
        assert_same(answers(llm), plain("llama"))


@pytest.mark.exhaustive
def test_a_rank_of_a_pipeline_rotates_its_own_layers(tmp_path, monkeypatch):
    """Whether it answers so can't be seen: vLLM 0.32 fails on the CPU with a pipeline, rotated
    or not."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = checkpoint(tmp_path, "llama", RECIPES["llama"])
    with engine(folder, pipeline_parallel_size=2) as llm:
        assert llm.apply_model(rotations) == [dict.fromkeys(PLACES, 1)] * 2


def test_no_quantization_takes_the_place_of_a_rotation():
    config = FastrotConfig()
    config.online_quantization_config = object()
    with pytest.raises(fastrot.RotationError, match="would quantize while loading"):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.down_proj")
    tiny = model("llama")
    fastrot.apply(tiny, ("R4",))
    rotated = SimpleNamespace(fastrot=tiny.config.fastrot)
    for method, taken in {"compressed-tensors": "fastrot", "gptq": None}.items():
        assert (
            FastrotConfig.override_quantization_method({"quant_method": method}, None, rotated)
            == taken
        )


@pytest.mark.exhaustive
def test_compiled(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder = checkpoint(tmp_path, "qwen3", RECIPES["qwen3"])
    assert_same(served(folder, enforce_eager=False), plain("qwen3"))


@pytest.mark.exhaustive  # in processes of their own vLLM's kernels for these crash on some CPUs
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_after_rotating(bits, tmp_path):
    expected = quantize(checkpoint(tmp_path, "llama", RECIPES["llama"]), bits)
    with engine(tmp_path, dtype="bfloat16") as llm:
        assert llm.apply_model(rotations) == [PLACES]
        error = distance(answers(llm), expected)
        for place in PLACES:
            assert 3 * error < distance(without(llm, place), expected)


def test_models_of_transformers(plain, tmp_path):
    folder = checkpoint(tmp_path, "llama", RECIPES["llama"])
    with engine(folder, model_impl="transformers") as llm:
        assert llm.apply_model(rotations) == [PLACES]
        assert_same(answers(llm), plain("llama"))
        assert without(llm, "fastrot_k_cache").tokens != plain("llama").tokens
