"""``from_pretrained`` of what was quantized after rotating: the rotations come by themselves.

The quantizer is one of ours, written against the interface of transformers alone: 8 bits, and a
scale for each row, in modules that are no linear ones.
"""

import json

import pytest
import torch
from helpers import logits, random_ids, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from zoo import FAMILIES, build

import fastrot
from fastrot.online import installed
from fastrot.rotations import KINDS

ALL = ("R1", "R2", "R3", "R4")
MODELS = ("llama", "mixtral", "gemma2")


class Packed(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.zeros_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(linear.out_features, 1))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def pack(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Config(QuantizationConfigMixin):
    def __init__(self, breaks=False, **kwargs):
        self.quant_method, self.breaks = "rounding", breaks
        self.dequantize = kwargs.get("dequantize", False)


class Quantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, module in list(model.named_modules()):
            owner, _, child = name.rpartition(".")
            if self.quantization_config.breaks and child == "mlp":
                setattr(model.get_submodule(owner), child, nn.Identity())
            elif "_proj" in child:
                # By its name, as patterns of tools do: a rotation there would be replaced.
                setattr(model.get_submodule(owner), child, Packed(module))

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.quantization_config.dequantize:
            for name, module in list(model.named_modules()):
                if isinstance(module, Packed):
                    linear = nn.Linear(module.in_features, module.out_features)
                    linear.weight.data, linear.bias = module.weight * module.scale, module.bias
                    owner, _, child = name.rpartition(".")
                    setattr(model.get_submodule(owner), child, linear)

    def is_serializable(self, **kwargs):
        return True


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", Config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "rounding", Quantizer)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def quantized(state):
    made = {}
    for name, value in state.items():
        if name.endswith("_proj.weight"):
            made[name], made[name.replace("weight", "scale")] = pack(value)
        else:
            made[name] = value
    return made


def without_operands(state):
    return {name: value for name, value in state.items() if ".fastrot_" not in name}


def saved(name, folder, **recipe):
    """A checkpoint, rotated and then quantized; what it computes, and the tokens."""
    model = build(FAMILIES[name], torch.float32)
    ids = random_ids(model, 2, 12, seed=0)
    fastrot.apply(model, **({"rotations": ALL} | recipe))
    model.save_pretrained(folder)
    for parameter, value in model.named_parameters():
        if parameter.endswith("_proj.weight"):
            codes, scale = pack(value.data)
            value.data = codes * scale
    tensors(folder, quantized)
    edit(folder, quantization_config={"quant_method": "rounding"})
    return ids, logits(model, ids)


@pytest.mark.parametrize("operands", ["kept", "gone"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_rotations_come_by_themselves(name, kind, operands, tmp_path):
    ids, expected = saved(name, tmp_path, transform_type=kind, randomize=True)
    if operands == "gone":
        tensors(tmp_path, without_operands)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any("refuse" in repr(m._forward_pre_hooks) for m in model.modules())
    assert relative_error(logits(model, ids), expected) < 1e-5
    fastrot.restore(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))
    for _, _, rotation in installed(again):
        rotation.forward = lambda x, part=False: x
    assert relative_error(logits(again, ids), expected) > 0.1


def test_a_base_model(tmp_path):
    ids, _ = saved("llama", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


@pytest.mark.parametrize("operands", ["kept", "gone"])
def test_a_given_matrix_is_read_or_asked_for(operands, tmp_path):
    width = build(FAMILIES["llama"], torch.float32).config.intermediate_size
    matrix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    ids, expected = saved("llama", tmp_path, rotations=("R4",), matrices={"R4": matrix})
    if operands == "kept":
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert relative_error(logits(model, ids), expected) < 1e-5
        return
    tensors(tmp_path, without_operands)
    with pytest.raises(fastrot.RecordError, match=r"R4, .* is missing, or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_operand_is_refused(tmp_path):
    saved("llama", tmp_path, transform_type="random-hadamard")
    tensors(tmp_path, lambda state: {n: -v if ".fastrot_" in n else v for n, v in state.items()})
    with pytest.raises(fastrot.RecordError, match="is not what its recorded seed"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_the_quantizer_made_of_the_model_may_have_no_place(tmp_path):
    saved("llama", tmp_path)
    edit(tmp_path, quantization_config={"quant_method": "rounding", "breaks": True})
    with pytest.raises(fastrot.RotationError, match="down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dequantized_it_is_an_ordinary_rotated_model(tmp_path):
    ids, expected = saved("llama", tmp_path)
    edit(tmp_path, quantization_config={"quant_method": "rounding", "dequantize": True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(model, ids), expected) < 1e-5
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "fastrot"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))
    fastrot.remove(again)


def test_fused_rotations_alone_need_nothing(tmp_path):
    ids, expected = saved("llama", tmp_path, rotations=("R1", "R2"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(logits(model, ids), expected) < 1e-5
    assert not any(installed(model))


def test_operands_that_the_record_does_not_name_are_refused(tmp_path):
    """A record of R3 beside a file that was rotated by R4, too."""
    saved("llama", tmp_path, rotations=("R3", "R4"))
    model = build(FAMILIES["llama"], torch.float32)
    fastrot.apply(model, "R3")
    edit(tmp_path, fastrot=model.config.fastrot)
    with pytest.raises(fastrot.RecordError, match="rotations that its record does not name"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
