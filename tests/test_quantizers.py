"""Quantizers after rotation: each is as good as on the unrotated model, or refuses.

A model whose online rotation is lost has a relative logit error near 1; the figures of the cells
are in docs/tools.md.
"""

import copy
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot.online import installed

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore::UserWarning"
)

GROUPS = {"R1R2": ("R1", "R2"), "R4": ("R4",), "R1-R4": ("R1", "R2", "R3", "R4")}
ONLINE = ("R4", "R1-R4")
MODELS = {
    "llama": lambda: tiny("llama", hidden=128, heads=8, intermediate=256),
    "qwen2_moe": lambda: build(FAMILIES["qwen2_moe"], torch.float32),
}


def replace_linears(model: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, new(child))
    return model


def rounded(linear):
    """Round to nearest, 8 bits and a scale for each row: what the tools do, in three lines."""
    twin = copy.deepcopy(linear)
    scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
    twin.weight.data = (linear.weight.data / scale).round() * scale
    return twin


def swap(model):
    return replace_linears(model, copy.deepcopy)


def plain(model):
    return replace_linears(model, rounded)


def parametrized(model):
    """Rounds a weight each time it is read, that of stacked experts too, which are no linears."""

    class Round(nn.Module):
        def forward(self, weight):
            scale = weight.abs().amax(-1, keepdim=True) / 127
            return (weight / scale).round() * scale

    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1 and not isinstance(module, nn.Embedding):
                nn.utils.parametrize.register_parametrization(module, name, Round())
    return model


def quanto(model, activations=None):
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=activations and qint8)
    if activations:
        with Calibration():
            model(random_ids(model, 2, 12, seed=1))
    freeze(model)
    return model


def quanto_activations(model):
    return quanto(model, activations=True)


def torchao_weights(model):
    tool = pytest.importorskip("torchao.quantization")
    tool.quantize_(model, tool.Int8WeightOnlyConfig())
    return model


def torchao_dynamic(model):
    tool = pytest.importorskip("torchao.quantization")
    tool.quantize_(model, tool.Int8DynamicActivationInt8WeightConfig())
    return model


def torch_dynamic(model):
    return quantize_dynamic(model, {nn.Linear}, torch.qint8)


def bitsandbytes(model, bits):
    bnb = pytest.importorskip("bitsandbytes")

    def new(linear):
        shape = linear.in_features, linear.out_features, linear.bias is not None
        if bits == 8:
            made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return replace_linears(model, new)


def bitsandbytes_int8(model):
    return bitsandbytes(model, 8)


def bitsandbytes_nf4(model):
    return bitsandbytes(model, 4)


def hqq(model):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=8, group_size=None)
    settings = {"compute_dtype": torch.float32, "device": "cpu"}
    return replace_linears(model, lambda linear: quantize.HQQLinear(linear, config, **settings))


def llmcompressor(model, scheme):
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    how = preset_name_to_scheme(scheme, ["Linear"])
    if scheme == "W4A16":
        how.weights.group_size = 8  # 128 is more than these models have.
    with tempfile.TemporaryDirectory() as folder:
        # It reads the configuration once more where the model came from, before it was rotated.
        config = copy.deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        config.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = folder
        oneshot(
            model=model,
            recipe=QuantizationModifier(config_groups={"all": how}),
            processor=PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        )
    return model


def llmcompressor_w8a8(model):
    return llmcompressor(model, "W8A8")


def llmcompressor_w4a16(model):
    return llmcompressor(model, "W4A16")


@dataclass(frozen=True)
class Tool:
    """A quantizer, and how its state is put into a model that was quantized alike."""

    quantize: Callable[[nn.Module], nn.Module]
    load: Callable[[nn.Module, dict], nn.Module] | None = None


def load(quantize, **kwargs):
    """Quantize a model with other weights alike, then load the state."""

    def function(model, state):
        model = quantize(model)
        model.load_state_dict(state, **kwargs)
        return model

    return function


def requantize(model, state):
    from optimum.quanto import quantization_map
    from optimum.quanto import requantize as function

    function(model, state, quantization_map(quanto(copy.deepcopy(model))))
    return model


TOOLS = {
    "swap": Tool(swap, load(swap)),
    "plain": Tool(plain, load(swap)),
    "parametrized": Tool(parametrized, load(parametrized)),
    "quanto": Tool(quanto, requantize),
    "quanto_activations": Tool(quanto_activations),
    "torchao_weights": Tool(torchao_weights, load(torchao_weights, assign=True)),
    "torchao_dynamic": Tool(torchao_dynamic, load(torchao_dynamic, assign=True)),
    "torch_dynamic": Tool(torch_dynamic, load(torch_dynamic)),
    "bitsandbytes_int8": Tool(bitsandbytes_int8, load(bitsandbytes_int8)),
    "bitsandbytes_nf4": Tool(bitsandbytes_nf4),
    "hqq": Tool(hqq, load(hqq)),
    "llmcompressor_w8a8": Tool(llmcompressor_w8a8),
    "llmcompressor_w4a16": Tool(llmcompressor_w4a16),
}


def refused(tool, name, groups):
    """llm-compressor makes linear modules of stacked experts, inside which R4 is."""
    return tool.startswith("llmcompressor") and name == "qwen2_moe" and groups in ONLINE


def rotated(model, groups):
    twin = copy.deepcopy(model)
    fastrot.apply(twin, GROUPS[groups], randomize=True)
    return twin


def error(quantized, model):
    ids = random_ids(model, 2, 12, seed=0)
    return relative_error(logits(quantized, ids), logits(model, ids))


def limit(model, tool):
    """The tool's own noise on the unrotated model, with room for another draw of it."""
    return 1.5 * error(TOOLS[tool].quantize(copy.deepcopy(model)), model) + 1e-5


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tool", TOOLS)
def test_no_worse_than_without_rotations(tool, name, groups):
    model = MODELS[name]()
    quantized = TOOLS[tool].quantize(rotated(model, groups))
    if refused(tool, name, groups):
        with pytest.raises(
            RuntimeError, match=r"R4: .*experts \(LinearExperts2D\) does not rotate"
        ):
            error(quantized, model)
    else:
        assert error(quantized, model) <= limit(model, tool)


@pytest.mark.parametrize("groups", ONLINE)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_rotation_that_is_lost_shows(tool, name, groups):
    """Negative control."""
    if refused(tool, name, groups):
        pytest.skip("there is nothing to lose")
    model = MODELS[name]()
    quantized = TOOLS[tool].quantize(rotated(model, groups))
    for _, holder, rotation in installed(quantized):
        if rotation.group == "R4":
            holder.__dict__.pop("forward", None)
            holder._forward_pre_hooks.clear()
    assert error(quantized, model) > max(0.1, limit(model, tool))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tool", [name for name, tool in TOOLS.items() if tool.load])
def test_saved_and_loaded(tool, name):
    """What the state is loaded into is built from the configuration, which records R3 and R4."""
    model = MODELS[name]()
    quantized = TOOLS[tool].quantize(rotated(model, "R1-R4"))
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    fresh = AutoModelForCausalLM.from_config(quantized.config).eval()
    bare = copy.deepcopy(fresh)
    ids = random_ids(model, 2, 12, seed=0)
    with pytest.raises((RuntimeError, fastrot.RecordError), match="fastrot"):
        TOOLS[tool].load(bare, copy.copy(state))(ids)
    fastrot.restore(fresh)
    loaded = TOOLS[tool].load(fresh, state)
    assert torch.equal(logits(loaded, ids), logits(quantized, ids))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tool", [t for t in TOOLS if t != "quanto_activations"])
def test_restored_after_it_was_quantized(tool, name):
    """As a checkpoint that a tool wrote in its own format comes back: without R3 and R4."""
    if refused(tool, name, "R1-R4"):
        pytest.skip("there is nothing to restore")
    model = rotated(MODELS[name](), "R1-R4")
    state = {n: value for n, value in model.state_dict().items() if "fastrot_" not in n}
    fresh = AutoModelForCausalLM.from_config(model.config).eval()
    fresh.load_state_dict(state)
    loaded = TOOLS[tool].quantize(fresh)
    ids = random_ids(model, 2, 12, seed=0)
    with pytest.raises(fastrot.RecordError, match=r"call fastrot\.restore\(model\)"):
        loaded(ids)
    if (tool, name) == ("parametrized", "qwen2_moe"):
        # Stacked experts have no parameter down_proj then, by which they are found.
        with pytest.raises(fastrot.RecordError, match="its layers"):
            fastrot.restore(loaded)
        return
    fastrot.restore(loaded)
    assert torch.equal(logits(loaded, ids), logits(TOOLS[tool].quantize(model), ids))


def test_a_checkpoint_of_llmcompressor(tmp_path):
    model = tiny("llama", hidden=128, heads=8, intermediate=256)
    quantized = llmcompressor_w8a8(rotated(model, "R1-R4"))
    model.config.save_pretrained(tmp_path / "origin")
    quantized.name_or_path = quantized.config._name_or_path = str(tmp_path / "origin")
    quantized.save_pretrained(tmp_path, save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(model, 2, 12, seed=0)
    assert torch.equal(logits(loaded, ids), logits(quantized, ids))


def table():
    """What docs/tools.md shows: ``python tests/test_quantizers.py`` prints it."""
    for tool in TOOLS:
        for name, make in MODELS.items():
            row = []
            for groups in ("", *GROUPS):
                model = make()
                try:
                    twin = rotated(model, groups) if groups else copy.deepcopy(model)
                    row.append(f"{error(TOOLS[tool].quantize(twin), model):.4f}")
                except pytest.skip.Exception:
                    row.append("not installed")
                except RuntimeError:
                    row.append("refused")
            print(f"| {tool} | {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    table()
