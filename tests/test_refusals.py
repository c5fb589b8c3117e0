"""Every refusal says what, which value and the way out, and leaves the model as it was."""

import copy
import io
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    difference,
    fingerprint,
    logits,
    random_ids,
    relative_error,
    tiny,
)
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import fastrot
from fastrot.mapping import ARCHITECTURES

ROTATIONS = ("R1", "R2", "R3", "R4")
LLAMA = ARCHITECTURES["llama"]
MAPPING = asdict(LLAMA.mapping)
NORMS = [asdict(norm) for norm in LLAMA.norms]
LAYER = "model.layers.0"


@cache
def _original(model_type: str, options: tuple[tuple[str, Any], ...]):
    return tiny(model_type, **dict(options))


def model_of(model_type: str = "llama", **options):
    """A fresh copy; building one is slower."""
    return copy.deepcopy(_original(model_type, tuple(sorted(options.items()))))


@dataclass(frozen=True)
class Case:
    """One refusal: how the model is changed, the call, the exception and words of its message."""

    error: type[Exception]
    words: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], Any] = lambda model: model
    options: dict[str, Any] = field(default_factory=dict)
    model_type: str = "llama"


def refused(function, model, case: Case) -> None:
    """``function`` raises what the case says, and nothing about the model has changed."""
    watched = isinstance(model, nn.Module)
    before = fingerprint(model) if watched else None
    random_state = torch.get_rng_state()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(model, **case.arguments)
    if watched:
        assert difference(before, fingerprint(model)) == []
    assert torch.equal(torch.get_rng_state(), random_state)
    message = str(caught.value)
    kinds = {ValueError: (ValueError, fastrot.RotationError)}.get(case.error, (case.error,))
    assert type(caught.value) in kinds, repr(caught.value)
    missing = [word for word in case.words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message


# --- changes to a model -------------------------------------------------------------------------


def changes(action: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A change in place."""

    def change(model):
        action(model)
        return model

    return change


def with_weight(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """Another parameter in the place of ``name``, without a gradient."""

    def change(model):
        owner, _, leaf = name.rpartition(".")
        old = model.get_parameter(name).detach()
        new = make(old)
        if type(new) is not nn.Parameter:
            new = nn.Parameter(new, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, new)
        return model

    return change


def with_module(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    """Another module in the place of ``name``."""

    def change(model):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, make(model.get_submodule(name)))
        return model

    return change


class PlainSubclass(torch.Tensor):
    """A tensor subclass over ordinary memory."""


class Packed(torch.Tensor):
    """A wrapper subclass, as quantization libraries make them: says float32, stores int8."""

    @staticmethod
    def __new__(cls, data: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor):
        self.packed = data.to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(arguments[0].packed)
        return NotImplemented


def declared_quantized(model):
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    up = model.get_submodule(f"{LAYER}.mlp.up_proj")
    up.register_buffer("qweight", torch.zeros(2, dtype=torch.int32))
    return model


def sequence_classifier(_):
    config = tiny("llama").config
    with torch.random.fork_rng(devices=[]):
        return LlamaForSequenceClassification(config)


class Scaled(nn.Module):
    """A linear layer of somebody's own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 2 * self.linear(x)


class LowRank(nn.Linear):
    """Passes as ``nn.Linear``, but reads its input a second time, through weights of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.down = nn.Parameter(torch.ones(2, linear.in_features))

    def forward(self, x):
        return super().forward(x) + (x @ self.down.T).sum(-1, keepdim=True)


class Negated(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return -x


class ClosedAttention(nn.Module):
    """Attention that does not go through transformers' interface."""

    def __init__(self, attention):
        super().__init__()
        self.config, self.head_dim = attention.config, attention.head_dim
        for name, child in attention.named_children():
            self.add_module(name, child)

    def forward(self, hidden_states, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


def shared(first: str, second: str) -> Callable[[Any], Any]:
    """Two names for one parameter."""

    def change(model):
        owner, _, leaf = second.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
        return model

    return change


def third_name(model):
    model.add_module("extra", nn.Embedding(1, 1))
    return shared("model.embed_tokens.weight", "extra.weight")(model)


def overlapping(model):
    mlp = model.model.layers[0].mlp
    memory = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    mlp.gate_proj.weight = nn.Parameter(memory[:112])
    mlp.up_proj.weight = nn.Parameter(memory[88:])
    return model


def same_memory(model):
    """Two parameter objects on the same bytes."""
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.gate_proj.weight.data)
    return model


def buffer_in_place_of(name: str) -> Callable[[Any], Any]:
    """A frozen tensor: same name, same value, but no parameter."""

    def change(model):
        owner, _, leaf = name.rpartition(".")
        module, value = model.get_submodule(owner), model.get_parameter(name).detach()
        delattr(module, leaf)
        module.register_buffer(leaf, value)
        return model

    return change


def rotated(*rotations: str, through: Callable[[Any], Any] = lambda model: model, **kwargs):
    def change(model):
        fastrot.apply(model, rotations, **kwargs)
        return through(model)

    return change


def saved_and_loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder)


def pickled(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


def inference_model(_):
    with torch.inference_mode():
        return tiny("llama")


def half_meta(model):
    model.model.layers[1].to("meta")
    return model


def bert(_):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        return BertForMaskedLM(BertConfig(intermediate_size=16, vocab_size=16, **sizes))


class UnheardConfig(LlamaConfig):
    model_type = "unheard"


class UnheardForCausalLM(LlamaForCausalLM):
    config_class = UnheardConfig


def unheard(_):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        return UnheardForCausalLM(UnheardConfig(num_hidden_layers=1, vocab_size=16, **sizes))


def bart(_):
    config = BartConfig(
        vocab_size=16,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        return BartForConditionalGeneration(config)


def attribute(path: str, value: Any) -> Callable[[Any], Any]:
    def change(model):
        *owners, leaf = path.split(".")
        owner = model
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, leaf, value)
        return model

    return change


def mapping(**fields: Any) -> dict[str, Any]:
    return {"mappings": {**MAPPING, **fields}}


def norms(index: int, **fields: Any) -> dict[str, Any]:
    """llama's norm mappings, with one of them changed."""
    changed = [dict(norm) for norm in NORMS]
    changed[index] |= fields
    return {"norm_mappings": changed}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


def config(scheme: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
    """A transform configuration with one scheme in one place; None drops a field."""
    place = {"targets": [r"re:.*down_proj$"], "location": "input"} | args
    place = {key: value for key, value in place.items() if value is not None}
    group = {"type": "hadamard", "apply": [place]} | (scheme or {})
    group = {key: value for key, value in group.items() if value is not None}
    return {"transform_config": {"config_groups": {"mine": group}}}


def two_groups(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    groups = [item["transform_config"]["config_groups"]["mine"] for item in (first, second)]
    return {"transform_config": {"config_groups": dict(zip(("one", "two"), groups, strict=True))}}


DiskUsage = namedtuple("DiskUsage", "total used free")

ARGUMENTS = {
    "rotation misspelt": Case(
        ValueError, ("'r11'", "R1, R2, R3, R4", "did you mean R1"), {"rotations": ["r11"]}
    ),
    "rotation unknown": Case(ValueError, ("'quarot'", "R1, R2, R3, R4"), {"rotations": "quarot"}),
    "rotation twice": Case(ValueError, ("R2", "twice"), {"rotations": ("R2", "r2")}),
    "rotation not a string": Case(ValueError, ("1", "R1, R2, R3, R4"), {"rotations": [1]}),
    "rotations empty": Case(ValueError, ("empty", "R1, R2, R3, R4"), {"rotations": ()}),
    "rotations empty string": Case(ValueError, ("''", "R1, R2, R3, R4"), {"rotations": ""}),
    "rotations None": Case(TypeError, ("rotations", "None", "R1"), {"rotations": None}),
    "rotations a number": Case(TypeError, ("rotations", "4", "R1"), {"rotations": 4}),
    "transform type": Case(
        ValueError,
        ("'hadamrad'", "hadamard, random-hadamard, random-matrix"),
        {"transform_type": "hadamrad"},
    ),
    "transform type None": Case(ValueError, ("None", "random-matrix"), {"transform_type": None}),
    "precision too low": Case(
        ValueError, ("bfloat16", "float64", "float32"), {"precision": torch.bfloat16}
    ),
    "precision unknown": Case(ValueError, ("flaot64", "float64"), {"precision": "flaot64"}),
    "precision an attribute of torch": Case(ValueError, ("nn", "float64"), {"precision": "nn"}),
    "precision a number": Case(ValueError, ("64", "float64"), {"precision": 64}),
    "precision zero": Case(ValueError, ("0", "float64"), {"precision": 0}),
    "seed a float": Case(TypeError, ("seed", "int", "1.5"), {"seed": 1.5}),
    "seed a string": Case(TypeError, ("seed", "int", "'0'"), {"seed": "0"}),
    "seed a bool": Case(TypeError, ("seed", "int", "True"), {"seed": True}),
    "seed None": Case(TypeError, ("seed", "int", "None"), {"seed": None}),
    "block size of R1": Case(
        ValueError,
        ("R1", "model.embed_tokens", "block_size=64", "96"),
        {"rotations": "R1", "block_size": 64},
    ),
    "block size of R4": Case(
        ValueError,
        ("R4", "down_proj", "block_size=32", "112"),
        {"rotations": "R4", "block_size": 32},
    ),
    "block size of R2": Case(
        ValueError,
        ("R2", "block_size=12", "head_dim 16"),
        {"rotations": "R2", "block_size": {"R2": 12}},
    ),
    "block size zero": Case(ValueError, ("block_size", "R1", "positive", "0"), {"block_size": 0}),
    "block size negative": Case(
        ValueError, ("block_size", "R1", "positive", "-8"), {"block_size": -8}
    ),
    "block size a bool": Case(TypeError, ("block_size", "int", "True"), {"block_size": True}),
    "block size a float": Case(TypeError, ("block_size", "int", "8.0"), {"block_size": 8.0}),
    "block size in a dict, a float": Case(
        TypeError, ("block_size", "R1", "int", "8.0"), {"block_size": {"R1": 8.0}}
    ),
    "block size of an unknown rotation": Case(
        ValueError, ("block_size", "'R7'", "R1, R2, R3, R4"), {"block_size": {"R7": 8}}
    ),
    "block size without Hadamard matrix": Case(
        fastrot.HadamardSizeError,
        ("R4", "down_proj", "14"),
        {"rotations": "R4", "block_size": 14},
    ),
    "mappings: unknown field": Case(
        ValueError, ("mappings", "atn_q", "fields", "attn_q"), mapping(atn_q=["x"])
    ),
    "mappings: missing field": Case(
        fastrot.NoMatchError,
        ("R1", "lm_head", "LlamaForCausalLM"),
        {"mappings": without(MAPPING, "lm_head")},
    ),
    "mappings: wrong type": Case(TypeError, ("mappings", "Mapping", "int"), {"mappings": 3}),
    "mappings: pattern without match": Case(
        fastrot.NoMatchError,
        ("re:.*k_porj$", "LlamaForCausalLM", "nearest", "k_proj"),
        mapping(attn_k=[r"re:.*k_porj$"]),
    ),
    "mappings: field of a wrong type": Case(
        TypeError, ("mappings", "attn_q", "5"), mapping(attn_q=5)
    ),
    "mappings: pattern of a wrong type": Case(
        TypeError, ("mappings", "attn_q", "5"), mapping(attn_q=[5])
    ),
    "mappings: bad regular expression": Case(
        fastrot.RotationError,
        ("re:.*(q_proj", "regular expression"),
        mapping(attn_q=["re:.*(q_proj"]),
    ),
    "mappings: reader left out": Case(
        fastrot.UncoveredParameterError,
        (f"{LAYER}.mlp.up_proj.", "LlamaForCausalLM", "role", "ignore"),
        {"rotations": "R1", **mapping(mlp_in=[r"re:.*gate_proj$"])},
    ),
    "mappings: reader without bias left out": Case(
        fastrot.UncoveredParameterError,
        (f"{LAYER}.mlp.up_proj.weight", "LlamaForCausalLM", "role", "ignore"),
        {"rotations": "R1", **mapping(mlp_in=[r"re:.*gate_proj$"])},
        options={"mlp_bias": False},
    ),
    "mappings: ignore without match": Case(
        fastrot.NoMatchError,
        ("re:.*q_norm", "LlamaForCausalLM"),
        {"rotations": "R1", **mapping(ignore=[r"re:.*q_norm.*"])},
    ),
    "mappings: writer named as a reader": Case(
        fastrot.UncoveredParameterError,
        (f"{LAYER}.self_attn.o_proj", "norm_mappings"),
        {"rotations": "R1", **mapping(attn_q=[r"re:.*self_attn\.[qo]_proj$"])},
    ),
    "mappings: head size wrong": Case(
        ValueError,
        ("attn_head_dim", "32", "16"),
        {"rotations": "R2", **mapping(attn_head_dim=32)},
    ),
    "mappings: head size a string": Case(
        TypeError,
        ("attn_head_dim", "'16'"),
        {"rotations": "R2", **mapping(attn_head_dim="16")},
    ),
    "mappings: R2 without the outputs": Case(
        fastrot.UnsupportedRotationError,
        ("R2", "attn_o"),
        {"rotations": "R2", **mapping(attn_o=())},
    ),
    "mappings: R2 with one value projection of two": Case(
        ValueError,
        ("R2", "model.layers.1"),
        {"rotations": "R2", **mapping(attn_v=[rf"{LAYER}.self_attn.v_proj"])},
    ),
    "norm_mappings: unknown field": Case(
        ValueError, ("norm_mappings", "offst", "offset"), norms(0, offst=1.0)
    ),
    "norm_mappings: missing field": Case(
        TypeError, ("norm_mappings", "'linears'"), {"norm_mappings": [{"norm": "model.norm"}]}
    ),
    "norm_mappings: not a sequence": Case(TypeError, ("norm_mappings", "5"), {"norm_mappings": 5}),
    "norm_mappings: norm without match": Case(
        fastrot.NoMatchError,
        ("re:.*inptu_layernorm$", "nearest", "input_layernorm"),
        norms(0, norm=r"re:.*inptu_layernorm$"),
    ),
    "norm_mappings: linears without match": Case(
        fastrot.NoMatchError,
        ("lm_haed", "nearest", "lm_head"),
        norms(2, linears=["lm_haed"]),
    ),
    "norm_mappings: wrong offset": Case(
        ValueError,
        ("model.norm", "LlamaRMSNorm", "weight + 1", "NormMapping.offset"),
        norms(2, offset=1.0),
    ),
    "norm_mappings: wrong offset of a large weight": Case(
        ValueError,
        ("model.norm", "weight + 1", "NormMapping.offset"),
        norms(2, offset=1.0),
        changes(lambda m: m.model.norm.weight.data.add_(60.0)),
    ),
    "norm_mappings: norm of another layer": Case(
        ValueError,
        ("model.layers.1.self_attn.q_proj", f"{LAYER}.input_layernorm"),
        {"rotations": "R1", **norms(0, norm=r"re:.*0\.input_layernorm$")},
        with_module(
            "model.layers.1.input_layernorm", lambda _: nn.RMSNorm(96, elementwise_affine=False)
        ),
    ),
    "norm_mappings: offset of a wrong type": Case(
        TypeError, ("norm_mappings", "offset", "'1'"), norms(2, offset="1")
    ),
    "norm_mappings: pattern of a wrong type": Case(
        TypeError, ("norm_mappings", "norm", "5"), norms(2, norm=5)
    ),
    "norm_mappings: reader of two norms": Case(
        ValueError,
        (f"{LAYER}.mlp.gate_proj", f"{LAYER}.input_layernorm", "post_attention", "norm_mappings"),
        norms(0, linears=[r"re:.*self_attn\.[qkv]_proj$", r"re:.*mlp\.gate_proj$"]),
    ),
    "norm_mappings: reader without norm": Case(
        fastrot.UncoveredParameterError,
        ("lm_head", "norm_mappings", "norm=None"),
        {"rotations": "R1", "norm_mappings": NORMS[:2]},
    ),
    "norm_mappings: ambiguous": Case(
        ValueError,
        (f"{LAYER}.self_attn.q_proj", "input_layernorm", "post_attention_layernorm", "narrower"),
        norms(0, norm=r"re:.*layernorm$"),
    ),
    "norm_mappings: norm that feeds nothing": Case(
        ValueError,
        (f"{LAYER}.input_layernorm", "re:.*1"),
        norms(0, linears=[r"re:.*1\.self_attn\.[qkv]_proj$"]),
    ),
}

TRANSFORM_CONFIGS = {
    "no dict": Case(TypeError, ("transform_config", "dict", "str"), {"transform_config": "R1"}),
    "empty": Case(ValueError, ("config_groups", "nothing"), {"transform_config": {}}),
    "no groups": Case(
        ValueError, ("config_groups", "at least one"), {"transform_config": {"config_groups": {}}}
    ),
    "unknown top field": Case(
        ValueError,
        ("config_groups", "version"),
        {"transform_config": {"version": 1, **config()["transform_config"]}},
    ),
    "scheme no dict": Case(
        TypeError, ("mine", "dict", "int"), {"transform_config": {"config_groups": {"mine": 3}}}
    ),
    "unknown field of a scheme": Case(
        ValueError, ("mine", "tpye", "fields", "type"), config({"tpye": "hadamard"})
    ),
    "missing type": Case(ValueError, ("mine", "missing type", "fields"), config({"type": None})),
    "unknown type": Case(ValueError, ("'fourier'", "random-matrix"), config({"type": "fourier"})),
    "unknown field of a place": Case(
        ValueError, ("apply", "target", "fields", "targets"), config(target=["x"])
    ),
    "missing location": Case(ValueError, ("apply", "missing location"), config(location=None)),
    "missing targets": Case(ValueError, ("apply", "missing targets"), config(targets=None)),
    "bad location": Case(
        ValueError, ("'sideways'", "input", "k_cache"), config(location="sideways")
    ),
    "learned": Case(ValueError, ("requires_grad", "False"), config({"requires_grad": True})),
    "bad precision": Case(ValueError, ("float16", "float32"), config({"precision": "float16"})),
    "apply of a wrong type": Case(TypeError, ("mine", "apply", "5"), config({"apply": 5})),
    "targets of a wrong type": Case(TypeError, ("targets", "5"), config(targets=5)),
    "target of a wrong type": Case(TypeError, ("targets", "5"), config(targets=[5])),
    "head_dim of a wrong type": Case(TypeError, ("head_dim", "'16'"), config({"head_dim": "16"})),
    "head_dim does not divide": Case(
        ValueError,
        ("mine", f"{LAYER}.mlp.down_proj", "block_size=24", "112"),
        config({"head_dim": 24}),
    ),
    "nothing to do": Case(ValueError, ("mine", "apply"), config({"apply": []})),
    "no match": Case(
        fastrot.NoMatchError, ("down_porj", "nearest", "down_proj"), config(targets="down_porj")
    ),
    "bad regular expression": Case(
        fastrot.RotationError, ("re:(", "regular expression"), config(targets="re:(")
    ),
    "fused into no linear": Case(
        ValueError,
        ("mine", f"{LAYER}.mlp", "LlamaMLP", "nn.Linear"),
        config(targets="LlamaMLP", location="weight_input"),
    ),
    "embedding has no weight_input": Case(
        ValueError,
        ("model.embed_tokens", "embedding", "weight_input"),
        config(targets="model.embed_tokens", location="weight_input"),
    ),
    "online at no linear": Case(
        ValueError, (f"{LAYER}.mlp", "LlamaMLP", "nn.Linear"), config(targets="LlamaMLP")
    ),
    "queries of no attention": Case(
        ValueError,
        ("down_proj", "Linear", "attention interface", "leave R3 out"),
        config(location="q_attn"),
    ),
    "two in one place": Case(
        ValueError,
        ("one", "two", f"{LAYER}.mlp.down_proj", "input"),
        two_groups(config(), config()),
    ),
    "tied tensor, different edits": Case(
        ValueError,
        (f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight", "copy"),
        config(targets=r"re:.*gate_proj$", location="weight_output"),
        shared(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
    ),
}

MODELS = {
    "not a model": Case(TypeError, ("transformers model", "str"), {}, lambda _: "llama"),
    "None": Case(TypeError, ("transformers model", "NoneType"), {}, lambda _: None),
    "class instead of instance": Case(
        TypeError, ("transformers model", "type"), {}, lambda _: LlamaForCausalLM
    ),
    "wrapper without config": Case(
        TypeError, ("Sequential", "config", "wrapper"), {}, nn.Sequential
    ),
    "data parallel": Case(TypeError, ("DataParallel", "config"), {}, nn.DataParallel),
    "adapters": Case(
        ValueError,
        ("LlamaForCausalLM", "adapters", "merge_and_unload"),
        {},
        attribute("peft_config", {"default": None}),
    ),
    "encoder-decoder": Case(
        ValueError, ("BartForConditionalGeneration", "encoder-decoder"), {}, bart
    ),
    "unknown architecture": Case(
        fastrot.UnknownArchitectureError,
        ("'unheard'", "mappings=", "norm_mappings=", "suggest_mapping"),
        {},
        unheard,
    ),
    "encoder": Case(ValueError, ("BertForMaskedLM", "is an encoder"), {}, bert),
    "nearly known architecture": Case(
        fastrot.UnknownArchitectureError,
        ("'qwen4'", "nearest", "qwen3", "qwen2", "mappings="),
        {},
        attribute("config.model_type", "qwen4"),
    ),
    "base model without head": Case(
        fastrot.NoMatchError,
        ("lm_head", "LlamaModel", "LlamaForCausalLM"),
        {},
        lambda model: model.model,
    ),
    "compiled": Case(
        TypeError, ("OptimizedModule", "torch.compile"), {}, lambda model: torch.compile(model)
    ),
    "declared quantized": Case(
        ValueError,
        ("quantized", "gptq", "then quantize"),
        {},
        declared_quantized,
    ),
    "int8 weight": Case(
        ValueError,
        (f"{LAYER}.mlp.up_proj.weight", "torch.int8", "then quantize"),
        {},
        with_weight(f"{LAYER}.mlp.up_proj.weight", lambda w: w.to(torch.int8)),
    ),
    "float8 weight": Case(
        ValueError,
        (f"{LAYER}.mlp.up_proj.weight", "float8_e4m3fn", "then quantize"),
        {},
        with_weight(f"{LAYER}.mlp.up_proj.weight", lambda w: w.to(torch.float8_e4m3fn)),
    ),
    "complex weight": Case(
        ValueError,
        (f"{LAYER}.mlp.up_proj.weight", "complex64"),
        {},
        with_weight(f"{LAYER}.mlp.up_proj.weight", lambda w: w.to(torch.complex64)),
    ),
    "tensor subclass": Case(
        ValueError,
        (f"{LAYER}.self_attn.o_proj.weight", "PlainSubclass", "plain"),
        {},
        with_weight(
            f"{LAYER}.self_attn.o_proj.weight",
            lambda w: nn.Parameter(w.clone().as_subclass(PlainSubclass)),
        ),
    ),
    "packed tensor subclass": Case(
        ValueError,
        (f"{LAYER}.self_attn.o_proj.weight", "Packed", "plain"),
        {},
        with_weight(
            f"{LAYER}.self_attn.o_proj.weight",
            lambda w: nn.Parameter(Packed(w), requires_grad=False),
        ),
    ),
    "partly meta": Case(
        ValueError, ("model.layers.1.", "meta device", "load the whole model"), {}, half_meta
    ),
    "one weight meta, R4": Case(
        ValueError,
        ("model.layers.1.mlp.down_proj.weight", "meta device"),
        {"rotations": "R4"},
        with_weight("model.layers.1.mlp.down_proj.weight", lambda w: w.to("meta")),
    ),
    "one weight meta, R3": Case(
        ValueError,
        ("model.layers.1.self_attn", "meta device", "load the whole model"),
        {"rotations": "R3", "transform_type": "random-hadamard"},
        changes(lambda m: m.model.layers[1].self_attn.to("meta")),
    ),
    "expanded weight": Case(
        ValueError,
        (f"{LAYER}.mlp.up_proj.weight", "strides (0, 1)", "contiguous()"),
        {},
        with_weight(f"{LAYER}.mlp.up_proj.weight", lambda w: w[:1].clone().expand(112, 96)),
    ),
    "strided weight": Case(
        ValueError,
        (f"{LAYER}.mlp.up_proj.weight", "strides (192, 2)", "contiguous()"),
        {},
        with_weight(f"{LAYER}.mlp.up_proj.weight", lambda w: w.repeat_interleave(2, dim=1)[:, ::2]),
    ),
    "overlapping memory": Case(
        ValueError,
        (f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight", "memory", "clone()"),
        {},
        overlapping,
    ),
    "same memory": Case(
        ValueError,
        (f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight", "memory", "clone()"),
        {},
        same_memory,
    ),
    "reader and writer share a parameter": Case(
        ValueError,
        (f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.o_proj.weight", "copy"),
        {},
        shared(f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.o_proj.weight"),
    ),
    "layers share a parameter after different norms": Case(
        ValueError,
        (f"{LAYER}.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "copy"),
        {},
        shared(f"{LAYER}.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    ),
    "three names for the embedding": Case(
        ValueError,
        ("model.embed_tokens.weight", "lm_head.weight", "copy"),
        {"rotations": "R1", **mapping(ignore=["extra.weight"])},
        third_name,
        {"tied": True},
    ),
    "made in inference mode": Case(ValueError, ("inference_mode", "clone"), {}, inference_model),
    "parametrized linear": Case(
        ValueError,
        (f"{LAYER}.self_attn.o_proj", "'weight'", "parametrized"),
        {},
        changes(
            lambda m: register_parametrization(
                m.model.layers[0].self_attn.o_proj, "weight", Negated()
            )
        ),
    ),
    "parametrized bias": Case(
        ValueError,
        (f"{LAYER}.self_attn.v_proj", "bias"),
        {"rotations": "R2"},
        changes(
            lambda m: register_parametrization(
                m.model.layers[0].self_attn.v_proj, "bias", Negated()
            )
        ),
    ),
    "bias that is a buffer": Case(
        ValueError,
        (f"{LAYER}.self_attn.o_proj", "bias"),
        {},
        buffer_in_place_of(f"{LAYER}.self_attn.o_proj.bias"),
    ),
    "norm weight that is a buffer": Case(
        ValueError, ("model.norm", "weight"), {}, buffer_in_place_of("model.norm.weight")
    ),
    "parametrized norm": Case(
        ValueError,
        ("model.norm", "weight"),
        {},
        changes(lambda m: register_parametrization(m.model.norm, "weight", Negated())),
    ),
    "custom linear": Case(
        ValueError,
        (f"{LAYER}.mlp.gate_proj", "Scaled", "nn.Linear"),
        {},
        with_module(f"{LAYER}.mlp.gate_proj", Scaled),
    ),
    "subclass of a linear with weights of its own": Case(
        ValueError,
        (f"{LAYER}.self_attn.o_proj", "LowRank"),
        {"rotations": "R2"},
        with_module(f"{LAYER}.self_attn.o_proj", LowRank),
    ),
    "heads of a layer do not divide its values": Case(
        ValueError,
        ("R2", "model.layers.1.self_attn.v_proj", "block_size=28", "divide 32"),
        {"rotations": "R2"},
        changes(lambda m: setattr(m.model.layers[1].self_attn, "head_dim", 28)),
    ),
    "streams of two sizes": Case(
        ValueError,
        ("R1", "one residual stream", "model.embed_tokens.weight", "48", "96"),
        {"rotations": "R1"},
        with_module("model.embed_tokens", lambda _: nn.Embedding(64, 48)),
    ),
    "another parameter": Case(
        fastrot.UncoveredParameterError,
        ("model.layers.1.mlp.router.weight", "LlamaForCausalLM", "role", "Mapping.ignore"),
        {},
        changes(lambda m: m.model.layers[1].mlp.add_module("router", nn.Linear(96, 4, bias=False))),
    ),
    "LayerNorm": Case(
        ValueError,
        (f"{LAYER}.input_layernorm", "LayerNorm", "centres", "R1"),
        {},
        with_module(f"{LAYER}.input_layernorm", lambda _: nn.LayerNorm(96, bias=False)),
    ),
    "norm with a bias": Case(
        ValueError,
        (f"{LAYER}.input_layernorm", "LayerNorm", "bias", "R1"),
        {},
        with_module(f"{LAYER}.input_layernorm", lambda _: nn.LayerNorm(96)),
    ),
    "norm without a weight": Case(
        ValueError,
        (f"{LAYER}.input_layernorm", "LayerNorm", "x / rms(x)", "NormMapping"),
        {},
        with_module(
            f"{LAYER}.input_layernorm", lambda _: nn.LayerNorm(96, elementwise_affine=False)
        ),
    ),
    "flash attention": Case(
        ValueError,
        (f"{LAYER}.self_attn", "'flash_attention_2'", "set_attn_implementation('sdpa')"),
        {"rotations": "R3"},
        attribute("config._attn_implementation", "flash_attention_2"),
    ),
    "attention off the interface": Case(
        ValueError,
        (f"{LAYER}.self_attn", "ClosedAttention", "interface", "leave R3 out"),
        {"rotations": "R3"},
        with_module(f"{LAYER}.self_attn", ClosedAttention),
    ),
    "record of a newer version": Case(
        fastrot.RecordError,
        ("format 99", "newer fastrot"),
        {},
        attribute("config.fastrot", {"format": 99, "applied": []}),
    ),
}

TWICE = {
    f"{name} twice{suffix}": Case(
        fastrot.AlreadyRotatedError,
        (name, "already", "original"),
        {"rotations": name.lower()},
        rotated(name, through=through),
    )
    for name in ROTATIONS
    for suffix, through in (
        ("", lambda model: model),
        (" after save and load", saved_and_loaded),
        (" after deepcopy", copy.deepcopy),
        (" after pickling", pickled),
    )
} | {
    "one of two twice": Case(
        fastrot.AlreadyRotatedError,
        ("R2", "already"),
        {"rotations": ("R2", "R4")},
        rotated("R1", "R2"),
    ),
    "own group twice": Case(
        fastrot.AlreadyRotatedError,
        ("mine", "already"),
        config(location="output"),
        rotated("R1", **config(location="input")),
    ),
}

NO_MATRIX = {
    "hidden size": ("R1", {"hidden": 90}, ("R1", "model.embed_tokens", "90"), 2),
    "intermediate size": ("R4", {"intermediate": 54}, ("R4", "down_proj", "54"), 2),
    "intermediate size 4 * 107": ("R4", {"intermediate": 428}, ("R4", "down_proj", "428"), 4),
    "head size for R2": ("R2", {"head_dim": 18}, ("R2", "v_proj", "18"), 2),
    "head size for R3": ("R3", {"head_dim": 18}, ("R3", "self_attn", "18"), 2),
}

EVERY = {
    f"{kind}: {name}": case
    for kind, cases in {
        "argument": ARGUMENTS,
        "transform_config": TRANSFORM_CONFIGS,
        "model": MODELS,
        "already": TWICE,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
def test_refused_and_untouched(case):
    model = case.change(model_of(case.model_type, **case.options))
    refused(fastrot.plan, model, case)
    refused(fastrot.apply, model, case)


def test_a_model_without_weights_can_be_planned_but_not_rotated():
    model = model_of().to("meta")
    assert str(fastrot.plan(model, ROTATIONS)) == str(fastrot.plan(model_of(), ROTATIONS))
    case = Case(fastrot.RotationError, ("meta device", "load the whole model"), {})
    refused(fastrot.apply, model, case)


def test_there_are_many_distinct_refusals():
    """Of each kind of message at least one case, counted without the four ways to come back."""
    assert len({(case.error, case.words) for case in EVERY.values()}) >= 45 + len(NO_MATRIX)


@pytest.mark.parametrize("name", NO_MATRIX)
def test_size_without_hadamard_matrix(name):
    """The message names block sizes that work, and with one of them it does work."""
    rotation, options, words, block = NO_MATRIX[name]
    model = model_of(dtype=torch.float64, **options)
    message = ("block", str(block))
    case = Case(fastrot.HadamardSizeError, (*words, *message), {"rotations": rotation})
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    refused(fastrot.plan, model, case)
    refused(fastrot.apply, model, case)
    for way_out in ({"block_size": {rotation: block}}, {"transform_type": "random-matrix"}):
        changed = copy.deepcopy(model)
        fastrot.apply(changed, rotation, **way_out)
        assert relative_error(logits(changed, ids), expected) <= 1e-6, way_out


@pytest.mark.parametrize("bad", ["ram", "auto", None, True])
def test_unknown_undo(bad):
    refused(fastrot.apply, model_of(), Case(ValueError, (repr(bad), "disk"), {"undo": bad}))


def test_no_room_for_the_journal(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(100, 99, 1))
    refused(
        fastrot.apply,
        model_of(tied=True),
        Case(OSError, ("journal", "free", "TMPDIR"), {"undo": "disk", "rotations": ROTATIONS}),
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("undo", ["none", "memory"])
def test_no_disk_is_needed_without_a_journal_on_it(undo, monkeypatch, tmp_path):
    """Negative control of the test above."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(100, 99, 1))
    fastrot.apply(model_of(), undo=undo)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", CLASSES)
def test_plan_never_writes(model_type, tied):
    model = model_of(model_type, tied=tied)
    before, random_state = fingerprint(model), torch.get_rng_state()
    for kind in ("hadamard", "random-hadamard", "random-matrix"):
        plan = fastrot.plan(model, ROTATIONS, transform_type=kind, randomize=True)
        assert "down_proj" in str(plan)
    assert difference(before, fingerprint(model)) == []
    assert torch.equal(torch.get_rng_state(), random_state)


def test_plan_runs_no_hook_of_the_users():
    """The trial of a norm is no forward pass of the model."""
    model = model_of()
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    fastrot.plan(model, ROTATIONS, trust=True)
    assert not seen


REMOVALS = {
    "not on it": (["R1"], ("R1", "not online", "R3, R4")),
    "unknown": (["R9"], ("R9", "not online", "R3, R4")),
    "nothing named": ([], ("no rotation", "R3, R4")),
    "of two on one side": (["R4"], ("R4", "mine", "dimension 1", "down_proj.weight")),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_remove_refuses(name):
    groups, words = REMOVALS[name]
    model = model_of()
    fastrot.apply(model, ("R1", "R3", "R4"))
    if "mine" in words:
        fastrot.apply(model, **config(location="weight_input"))
    refused(fastrot.remove, model, Case(ValueError, words, {"groups": groups}))


def test_remove_twice():
    model = model_of()
    handle = fastrot.apply(model, ("R1", "R4"))
    handle.remove()
    refused(lambda _: handle.remove(), model, Case(ValueError, ("R4", "not online", "none")))


# --- what looks odd and is fine -----------------------------------------------------------------


def halves_of_one_tensor(model):
    """Disjoint parts of one memory, as after splitting a fused weight."""
    mlp = model.model.layers[0].mlp
    memory = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data])
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = memory.split(112)


def transposed_in_memory(model):
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


ODD = {
    "q and k are one parameter": (
        shared(f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"),
        {"kv_heads": 6},
    ),
    "gate and up are one parameter": (
        shared(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
        {},
    ),
    "a norm of two layers is one parameter": (
        shared(f"{LAYER}.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
        {},
    ),
    "halves of one tensor": (changes(halves_of_one_tensor), {}),
    "transposed in memory": (changes(transposed_in_memory), {}),
    "frozen": (changes(lambda m: m.requires_grad_(False)), {}),
    "in training mode": (changes(lambda m: m.train()), {}),
    "tied": (changes(lambda m: None), {"tied": True}),
}


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
@pytest.mark.parametrize("name", ODD)
def test_odd_but_fine(name, kind):
    change, options = ODD[name]
    model = change(model_of(dtype=torch.float64, **options))
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    modes = [module.training for module in model.modules()]
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    fastrot.apply(model, ROTATIONS, transform_type=kind)
    assert relative_error(logits(model, ids), expected) <= 1e-6
    assert [m.training for m in model.modules()][: len(modes)] == modes[:1] * len(modes)
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in gradients} == gradients


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_a_model_compiled_before_is_compiled_anew(rotation):
    """What torch.compile has traced, without the online rotations, must not run any more."""
    model = model_of(dtype=torch.float64)
    ids = random_ids(model, 2, 8, seed=0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = logits(compiled, ids)
    fastrot.apply(model, rotation)
    assert relative_error(logits(compiled, ids), expected) <= 1e-6


@pytest.mark.parametrize("make", [lambda m: m.model, sequence_classifier], ids=["base", "classes"])
def test_without_r1_no_head_is_needed(make):
    """R2, R3 and R4 stay inside the blocks: any decoder of the family will do."""
    model = make(model_of(dtype=torch.float64)).double().eval()
    base = getattr(model, "model", model)
    ids = random_ids(model, 2, 8, seed=0)
    with torch.no_grad():
        expected = base(ids).last_hidden_state
        fastrot.apply(model, ("R2", "R3", "R4"))
        assert relative_error(base(ids).last_hidden_state, expected) <= 1e-6


# --- the fingerprint itself ---------------------------------------------------------------------


def flip_one_bit(model):
    bits = model.model.layers[1].mlp.down_proj.weight.data.view(torch.int32)
    bits[3, 5] ^= 1


def swap_parameter(model):
    old = model.model.norm.weight
    model.model.norm.weight = nn.Parameter(old.detach().clone())


def move_memory(model):
    model.model.norm.weight.data = model.model.norm.weight.data.clone()


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def set_gradient(model):
    model.model.norm.weight.grad = torch.ones(96)


def same_record(model):
    model.config = copy.deepcopy(model.config)


MUTATIONS = {
    "one bit": (flip_one_bit, "model.layers.1.mlp.down_proj.weight: bytes"),
    "buffer": (
        lambda m: m.model.rotary_emb.inv_freq.mul_(2.0),
        "model.rotary_emb.inv_freq: bytes",
    ),
    "negative zero": (lambda m: m.lm_head.weight.data[0, 0].mul_(-1.0), "lm_head.weight: bytes"),
    "parameter object": (swap_parameter, "model.norm.weight: object"),
    "memory": (move_memory, "model.norm.weight: memory"),
    "tie": (untie, "lm_head.weight: object"),
    "gradient": (set_gradient, "model.norm.weight: grad"),
    "requires_grad": (lambda m: m.lm_head.weight.requires_grad_(False), "lm_head.weight: layout"),
    "dtype": (lambda m: m.model.norm.bfloat16(), "model.norm.weight: layout"),
    "hook": (
        lambda m: m.model.norm.register_forward_pre_hook(print),
        "model.norm: _forward_pre_hooks",
    ),
    "output hook": (lambda m: m.lm_head.register_forward_hook(print), "lm_head: _forward_hooks"),
    "submodule": (lambda m: m.model.norm.add_module("x", nn.Identity()), "model.norm: _modules"),
    "own forward": (lambda m: setattr(m.model.norm, "forward", print), "model.norm: forward"),
    "mode": (lambda m: m.model.layers[0].train(), "model.layers.0: training"),
    "buffer in the state dict": (
        lambda m: m.model.norm.register_buffer("x", torch.ones(1)),
        "state_dict",
    ),
    "config": (lambda m: setattr(m.config, "use_cache", False), ".config: to_dict"),
    "config record": (lambda m: setattr(m.config, "fastrot", {}), ".config: fastrot"),
    "config object": (same_record, ": config"),
    "attention": (
        lambda m: setattr(m.config, "_attn_implementation", "eager"),
        ".config: attention",
    ),
    "tied keys": (lambda m: m.all_tied_weights_keys.clear(), ": all_tied_weights_keys"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_fingerprint_notices(name):
    mutate, entry = MUTATIONS[name]
    model = model_of(tied=True)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0.0
    before = fingerprint(model)
    assert difference(before, fingerprint(model)) == []
    mutate(model)
    assert entry in difference(before, fingerprint(model))


def test_refused_fails_where_nothing_is_refused_or_something_is_touched():
    """Negative control of the helper of this file."""
    model = model_of()
    case = Case(ValueError, ("word",), {})

    def touches(m, **_):
        flip_one_bit(m)
        raise ValueError("word")

    def harmless(m, error=ValueError, message="word"):
        raise error(message)

    refused(harmless, model, case)
    for function in (
        touches,
        lambda m: None,
        lambda m: harmless(m, KeyError),
        lambda m: harmless(m, message="other"),
        lambda m: harmless(m, message="word\nword"),
        lambda m: [torch.rand(1), harmless(m)],
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            refused(function, model, case)
