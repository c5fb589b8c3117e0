"""R1 online in vLLM: behind post-norms, and at the ends of the stream with `keep_head`."""

import pytest
import torch
from checkpoints import POST_NORMS, checkpoint
from engine import answers, assert_same, engine, rotations, served, without
from torch import nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.model_executor.models.utils import PPMissingLayer

import fastrot
from fastrot.edits import OnlineSite
from fastrot.integrations.vllm.config import FastrotConfig
from fastrot.integrations.vllm.stream import rotate_stream

KEPT = {"rotations": ("R1",), "keep_head": True, "transform_type": "random-hadamard"}
RECIPES = {
    "gemma2": {"rotations": ("R1", "R2", "R3", "R4"), "keep_head": True},
    "gemma3_text": {"rotations": ("R1", "R2", "R3", "R4"), "transform_type": "random-hadamard"},
    # Of transformers in vLLM, which has no such model of its own.
    "olmo2": {"rotations": ("R1", "R2", "R3", "R4"), "transform_type": "random-matrix"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", POST_NORMS)
def test_behind_post_norms(family, plain, tmp_path):
    with engine(checkpoint(tmp_path, family, RECIPES[family])) as llm:
        [places] = llm.apply_model(rotations)
        assert places["fastrot_output"] == 4
        assert_same(answers(llm), plain(family))
        for layer in ("0.post_attention_layernorm", "1.post_feedforward_layernorm"):
            assert without(llm, "fastrot_output", layer).tokens != plain(family).tokens


@pytest.mark.exhaustive
@pytest.mark.parametrize("impl", ["vllm", "transformers"])
def test_the_head_is_kept(impl, plain, tmp_path):
    with engine(checkpoint(tmp_path, "llama", KEPT), model_impl=impl) as llm:
        assert llm.apply_model(rotations) == [{"fastrot_input": 2}]
        assert_same(answers(llm), plain("llama"))
        for end in ("layers.0", "model.norm"):
            assert without(llm, "fastrot_input", end).tokens != plain("llama").tokens


@pytest.mark.exhaustive
def test_the_stream_is_whole_on_every_rank(plain, tmp_path, monkeypatch):
    """R1 of one block of all 128 channels, where each of the two ranks has half of the weights."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(checkpoint(tmp_path, "llama", KEPT), tensor_parallel_size=2) as llm:
        assert llm.apply_model(rotations) == [{"fastrot_input": 2}] * 2
        assert_same(answers(llm), plain("llama"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["gemma3_text"])
def test_compiled(family, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder = checkpoint(tmp_path, family, RECIPES[family] | {"keep_head": True})
    assert_same(served(folder, enforce_eager=False), plain(family))


class Layer(nn.Module):
    """As vLLM's decoder layers: the stream is the sum of two arguments."""

    def forward(self, positions, hidden_states, residual=None):
        return (hidden_states, residual) if residual is not None else hidden_states


class Compiled(Layer, TorchCompileWithNoGuardsWrapper):
    """A layer that vLLM compiles by itself, from the forward of its class."""

    def __init__(self):
        nn.Module.__init__(self)


class Pooler(nn.Module):
    def forward(self, pooled):
        return pooled


def site(location, inverse=False):
    rotation = fastrot.Rotation("random-hadamard", 12, seed=1)
    return OnlineSite("model.layers.0", location, rotation, inverse, "R1")


def test_each_form_of_a_call():
    x, residual = torch.randn(2, 5, 12, dtype=torch.float64)
    whole, ends = site("input").rotation.matrix(), {}
    for location in ("input", "output"):
        ends[location] = Layer()
        assert rotate_stream(ends[location], site(location))
    for call in (lambda m: m(0, x, residual), lambda m: m(0, residual=residual, hidden_states=x)):
        for got, given in zip(call(ends["input"]), (x, residual), strict=True):
            torch.testing.assert_close(got, given @ whole)
        rotated, kept = call(ends["output"])
        torch.testing.assert_close(rotated, x @ whole)
        assert torch.equal(kept, residual)
    for end in ends.values():
        torch.testing.assert_close(end(0, x), x @ whole)
        torch.testing.assert_close(end(0, x, residual=None), x @ whole)


def test_what_can_not_be_rotated_is_left_as_it_was():
    quantized = Layer()
    quantized.quant_method = None
    for module in (quantized, Compiled(), Pooler()):
        assert not rotate_stream(module, site("input"))
        assert "forward" not in vars(module)
        assert not list(module.children())


def test_a_rank_of_a_pipeline_has_its_own_layers():
    config, model = FastrotConfig(), nn.Module()
    model.layers = nn.ModuleList([PPMissingLayer(), Layer()])
    places = [(f"layers.{n}", "input") for n in range(3)]
    config.sites = {place: site("input") for place in places}
    config.rotate_built(model)
    config.rotate_built(model)
    assert config.served == {places[1]}
    assert set(config.sites) == set(places[1:])
    assert len(list(model.layers[1].children())) == 1
