"""Suggested rows: they verify, agree with the tables, and say what they can't do."""

import copy

import pytest
import torch
import transformers
from helpers import difference, fingerprint, relative_error, tiny
from test_zoo import first_of_each_row
from torch import nn
from zoo import FAMILIES, build, inputs

import fastrot
import fastrot.api
import fastrot.rows
import fastrot.suggest
from fastrot.coverage import classify
from fastrot.index import Index
from fastrot.mapping import (
    Architecture,
    Mapping,
    Norm,
    Untouched,
    find_architecture,
)
from fastrot.mapping.tables import SHELLS
from fastrot.suggest import suggest_mapping
from fastrot.suggest.names import Names
from fastrot.suggest.probe import Leg
from fastrot.suggest.tiny import tiny_copy

NAMES = {
    "Architecture": Architecture,
    "Mapping": Mapping,
    "Norm": Norm,
    "Untouched": Untouched,
}
INDEXER = "the indexer picks positions, so no gradient passes through it"
START = "a parameter that no module owns begins the stream"
NO_STREAM = "without a rotation that passes the stream the probe does not know what writes it"
BEHIND = {  # family → rotation that its row has and a suggestion lacks
    "deepseek_v32": {"R1": INDEXER},
    "glm_moe_dsa": {"R1": INDEXER},
    "minimax_m3_vl_text": {"R1": INDEXER},
    "gpt_neox_japanese": {
        "R2": "a bias of its own beside the output projection looks like another"
    },
    "hrm_text": {"R1": START, "R2": START},
    "modernbert-decoder": {"R1": "a norm stands between the embedding and the stream"},
    "zamba2": {"R2": "the adapter of the values looks like another projection"},
    **{name: {"R2": NO_STREAM} for name in ("dory", "zaya", "inkling_text")},
    "gemma4_experts": {"R1": "a scale of the router's is no norm", "R2": NO_STREAM},
    "doge": {"R2": NO_STREAM, "R4": "rounding may change which positions it keeps"},
    "longcat_flash": {
        "R2": NO_STREAM,
        "R3": "its attention does not call itself that",
        "R4": "two blocks in a layer share its experts",
    },
}
ALIKE = {"dbrx"}
"""A bare matrix that is used transposed reads with its columns what it writes with them."""
FAST = {
    "llama",
    "qwen2",
    "phi3",
    "gemma",
    "gemma2",
    "olmo2",
    "bitnet",
    "cohere",
    "opt",
    "gpt2",
    "gpt_neox",
    "falcon_parallel",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "llama4_text",
    "qwen3_next",
    "mamba2",
    "nemotron_h",
    "kimi_linear",
}


def marks(name):
    """What is like another family in the tables is suggested like it, too."""
    if name in FAST:
        return []
    return [pytest.mark.slow if name in first_of_each_row() else pytest.mark.exhaustive]


TEXT = [
    pytest.param(name, marks=marks(name))
    for name, family in FAMILIES.items()
    if family.vision is None and family.model_type not in SHELLS
]


def split(model, row):
    """Every parameter as a reader, a writer, or neither."""
    roles = classify(model, row.mapping, row.norms)
    ends = ("reader", "writer")
    return {
        name: role if (role := roles.get(name)) in ends else "neither"
        for name, _ in model.named_parameters()
    }


def check(model):
    suggestion = suggest_mapping(model)
    with_experts = getattr(model.config, "enable_moe_block", False)
    behind = BEHIND.get("gemma4_experts" if with_experts else model.config.model_type, {})
    row = fastrot.rows.present(Index(model), find_architecture(model.config))
    places = {
        "R1": row.mapping.embedding,
        "R2": row.mapping.attn_o,
        "R3": row.mapping.attn,
        "R4": row.mapping.mlp_out,
    }
    for rotation, error in suggestion.errors.items():
        if isinstance(error, float) and rotation not in suggestion.row.refuses:
            assert error <= 1e-12, rotation
        elif places[rotation] and rotation not in row.refuses and rotation not in behind:
            with pytest.raises(ValueError, match="leave"):  # then the table's row can't either
                fastrot.plan(model, rotation)
    if "R1" not in row.refuses and "R1" not in behind and model.config.model_type not in ALIKE:
        assert split(model, suggestion.row) == split(model, row)
    assert eval(str(suggestion), dict(NAMES)) == suggestion.row
    return suggestion


@pytest.mark.parametrize("name", TEXT)
def test_agrees_with_the_table(name):
    check(build(FAMILIES[name]))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_small_models(name):
    suggestion = check(tiny(name))
    assert suggestion.uncertain == ()
    assert suggestion.row.refuses == {}
    assert suggestion.mapping.attn_q == (r"re:.*\.self_attn\.q_proj$",)
    assert suggestion.mapping.lm_head == ("lm_head",)


REAL = {  # no rows are needed for these
    "LlamaConfig": "LlamaForCausalLM",
    "Qwen3MoeConfig": "Qwen3MoeForCausalLM",
    "Gemma2Config": "Gemma2ForCausalLM",
    "Olmo2Config": "Olmo2ForCausalLM",
    "CohereConfig": "CohereForCausalLM",
    "Phi3Config": "Phi3ForCausalLM",
    "GPTNeoXConfig": "GPTNeoXForCausalLM",
    "GPT2Config": "GPT2LMHeadModel",
    "OPTConfig": "OPTForCausalLM",
    "Qwen3NextConfig": "Qwen3NextForCausalLM",
    "DeepseekV3Config": "DeepseekV3ForCausalLM",
}


def on_meta(config_class):
    config = getattr(transformers, config_class)()
    with torch.device("meta"):
        return getattr(transformers, REAL[config_class])(config)


@pytest.mark.parametrize("config_class", REAL)
def test_real_sizes_on_the_meta_device(config_class):
    model = on_meta(config_class)
    before = fingerprint(model)
    suggestion = suggest_mapping(model)
    assert difference(before, fingerprint(model)) == []
    assert set(suggestion.row.refuses) <= {"R3"}
    assert [line for line in suggestion.uncertain if "on the model" in line] == []


def test_every_kind_of_layer_is_in_the_copy():
    copied = tiny_copy(on_meta("Qwen3NextConfig"))
    assert copied.config.layer_types == [*["linear_attention"] * 3, "full_attention"]
    assert {p.dtype for p in copied.parameters()} == {torch.float64}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_model_and_the_random_state_are_untouched(device):
    model = tiny("qwen2", tied=True).to(device)
    before, state = fingerprint(model), torch.get_rng_state()
    suggest_mapping(model)
    assert difference(before, fingerprint(model)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_use_it():
    family = FAMILIES["mixtral"]
    model = build(family, torch.float32)
    suggestion = suggest_mapping(model)
    given = inputs(family, model)
    with torch.no_grad():
        before = model(**given).logits
        roles = {"mappings": suggestion.mapping, "norm_mappings": suggestion.norms}
        fastrot.apply(model, ("R1", "R2", "R3", "R4"), **roles)
        assert relative_error(model(**given).logits, before) < 1e-5


def sabotaged(monkeypatch, spoil):
    """A suggestion for Llama after ``spoil(findings)``."""
    measure = fastrot.suggest.measure

    def wrong(model):
        findings, charges = measure(model)
        spoil(findings)
        return findings, charges

    monkeypatch.setattr(fastrot.suggest, "measure", wrong)
    return suggest_mapping(tiny("llama"))


def forget_a_reader(findings):
    findings.stream.remove(Leg("model.layers.1.mlp.up_proj.weight", 1))


def invent_a_writer(findings):
    findings.stream.add(Leg("model.layers.1.self_attn.q_proj.weight", 0))


def forget_a_scale(findings):
    findings.norms["model.norm"].readers.clear()


def mistake_a_post_norm(findings):
    findings.post_norms["model.layers.0.input_layernorm"] = set()


SPOILS = [forget_a_reader, invent_a_writer, forget_a_scale, mistake_a_post_norm]


@pytest.mark.parametrize("spoil", SPOILS)
def test_the_trial_catches_a_wrong_probe(monkeypatch, spoil):
    suggestion = sabotaged(monkeypatch, spoil)
    error = suggestion.errors["R1"]
    assert isinstance(error, str) or error > 1e-3
    assert "R1" in suggestion.row.refuses
    assert "R1 DOES NOT HOLD" in str(suggestion).splitlines()[1]


def test_an_impossible_stream_is_said_at_the_top():
    """MiniMax's residual stream is the output of its norms."""
    suggestion = suggest_mapping(build(FAMILIES["minimax"]))
    text = str(suggestion)
    assert text.splitlines()[1] == "# R1 DOES NOT HOLD: this row is incomplete."
    assert "no set of readers and writers" in text.splitlines()[2]
    assert "R1" in suggestion.row.refuses
    assert "R2" not in suggestion.row.refuses
    assert eval(text, dict(NAMES)) == suggestion.row


def test_what_has_no_influence_is_left_open():
    suggestion = suggest_mapping(build(FAMILIES["deepseek_v32"]))
    assert "indexer.wk.weight has no influence" in str(suggestion).split("Architecture(")[0]
    assert "indexer.wk" in suggestion.row.refuses["R1"]


def test_clipping_is_uncertain():
    model = build(FAMILIES["olmoe"], clip_qkv=1e6)
    assert any("clip_qkv" in line for line in suggest_mapping(model).uncertain)


def test_never_used_silently(monkeypatch):
    monkeypatch.setattr(fastrot.suggest, "suggest_mapping", None)
    model = tiny("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(fastrot.UnknownArchitectureError, match="suggest_mapping"):
        fastrot.apply(model)


def rotated():
    model = tiny("llama")
    fastrot.apply(model)
    return model


def quantized():
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    model.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(1))
    return model


def encoder_decoder():
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def multimodal():
    text = tiny("llama").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


def unbuildable():
    class Broken(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no kernel for this")

    return Broken(tiny("llama").config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "no transformers config"),
        (lambda: tiny("llama").model, ValueError, "no language-modelling head"),
        (encoder_decoder, ValueError, "encoder-decoder"),
        (quantized, ValueError, "quantized"),
        (rotated, fastrot.AlreadyRotatedError, "R1 and R2"),
        (multimodal, ValueError, "around a language model"),
        (unbuildable, ValueError, "no small copy.*no kernel for this"),
    ],
)
def test_what_can_not_be_done(make, error, message):
    with pytest.raises(error, match=message):
        suggest_mapping(make())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["head"], ("head",)),
        (["norm"], ("norm",)),
        (["layers.0.norm", "layers.1.norm"], (r"re:.*\.norm$",)),
        (["layers.0.mlp.2", "layers.1.mlp.2"], (r"re:.*\.mlp\.2$",)),  # 2 is a name
        (["layers.1.mlp.0"], ("layers.1.mlp.0",)),
        (["layers.0", "layers.1"], (r"re:layers\.\d+$",)),
    ],
)
def test_patterns(names, patterns):
    assert Names(Stack()).patterns(names) == patterns


def test_a_copy_may_be_deep_copied_and_printed():
    suggestion = suggest_mapping(tiny("llama"))
    assert copy.deepcopy(suggestion) == suggestion
