"""Online rotations are held by the block around a linear module, whatever becomes of the latter."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D
from zoo import FAMILIES, build

import fastrot

GROUPS = (("R4",), ("R1", "R2", "R3", "R4"))
MODELS = ("llama", "gpt2", "mixtral", "qwen2_moe", "opt", "falcon_parallel")


def rotations_of(name, groups):
    row = fastrot.mapping.find_architecture(build(FAMILIES[name]).config)
    return [group for group in groups if group not in row.refuses]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture(params=GROUPS, ids="-".join)
def pair(request, name):
    model = build(FAMILIES[name], torch.float32)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, rotations_of(name, request.param), randomize=True)
    return model, rotated


def error(rotated, model):
    ids = random_ids(model, 2, 12, seed=0)
    return relative_error(logits(rotated, ids), logits(model, ids))


def linears(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, Conv1D)):
                yield module, name, child


def swap(model):
    """What optimum-quanto does: another module with the same weight in the place of each linear."""
    for module, name, old in linears(model):
        new = nn.Linear(*reversed(old.weight.shape), bias=old.bias is not None)
        if isinstance(old, Conv1D):
            new = Conv1D(*reversed(old.weight.shape))
        new.load_state_dict(old.state_dict())
        setattr(module, name, new)
    return model


class Adapter(nn.Module):
    """LoRA as PEFT puts it on: around the linear, under its name."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        inputs, outputs = base.weight.shape[:: 1 if isinstance(base, Conv1D) else -1]
        self.a = nn.Parameter(torch.randn(inputs, 2) * 0.3)
        self.b = nn.Parameter(torch.randn(2, outputs) * 0.3)

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b

    def merged(self):
        product = self.a @ self.b
        self.base.weight.data += product if isinstance(self.base, Conv1D) else product.T
        return self.base


def test_every_linear_is_swapped(pair):
    model, rotated = pair
    assert error(swap(rotated), model) < 1e-5


def test_these_tests_notice_a_rotation_that_is_lost(pair):
    """Negative control: the function without the rotations is another one."""
    model, rotated = pair
    for module in rotated.modules():
        if any("_input" in name for name, _ in module.named_children()):
            module.__dict__.pop("forward", None)
            module._forward_pre_hooks.clear()
    assert error(rotated, model) > 0.05


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_that_is_swapped(pair, duplicate):
    model, rotated = pair
    twin = swap(duplicate(rotated))
    assert error(twin, model) < 1e-5
    for module in rotated.modules():
        for value in vars(module).values():
            if isinstance(value, functools.partial):
                assert value.args[0] is module
    assert error(rotated, model) < 1e-5


def test_merged_is_unmerged(pair):
    model, rotated = pair
    for module, name, child in linears(rotated):
        if module is not rotated:
            setattr(module, name, Adapter(child))
    ids = random_ids(model, 2, 12, seed=0)
    unmerged = logits(rotated, ids)
    assert relative_error(unmerged, logits(model, ids)) > 0.01
    for module in list(rotated.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Adapter):
                setattr(module, name, child.merged())
    assert relative_error(logits(rotated, ids), unmerged) < 1e-5


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization_is_no_worse_than_without_rotations(pair):
    model, rotated = pair
    quantized = quantize_dynamic(rotated, {nn.Linear}, torch.qint8)
    assert error(quantized, model) < 1.5 * error(quantize_dynamic(model), model) + 0.05


class Reader(LlamaMLP):
    def forward(self, x):
        act = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return nn.functional.linear(act, self.down_proj.weight, self.down_proj.bias)


class Transposer(LlamaMLP):
    def forward(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x) @ self.down_proj.weight.T


class Skipper(LlamaMLP):
    def forward(self, x):
        return x


class Caster(LlamaMLP):
    """Reads what does not depend on the values, through a method and ``super()``."""

    def cast(self, x):
        return x.to(self.down_proj.weight.dtype)[..., : self.down_proj.out_features]

    def forward(self, x):
        return super().forward(self.cast(x))


class Splitter(LlamaMLP):
    """Calls it in a method, and keeps a state."""

    def down(self, x):
        return self.down_proj(x)

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.down(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Reader, r"R4 in Reader: down_proj\.weight is used past its module"),
        (Transposer, r"R4 in Transposer: down_proj\.weight is used past its module"),
        (Skipper, r"R4 in Skipper: down_proj was not called"),
    ],
)
def test_a_forward_that_goes_past_the_module_raises(kind, message):
    model = tiny("llama")
    fastrot.apply(model, "R4")
    model.model.layers[1].mlp.__class__ = kind
    with pytest.raises(RuntimeError, match=message):
        model(random_ids(model, 1, 4, seed=0))


def test_a_block_that_is_called_alone_notices_another_module():
    model = tiny("llama")
    fastrot.apply(model, "R4")
    another_module(mlp := model.model.layers[0].mlp)
    with pytest.raises(RuntimeError, match=r"is gone .fastrot_down_proj_input is Identity"):
        mlp(torch.ones(1, model.config.hidden_size))


@pytest.mark.parametrize(
    ("group", "path"),
    [("R4", "model.layers.0.mlp"), ("R4", ""), ("R3", "model.layers.0.self_attn")],
)
def test_replicas_of_data_parallel_are_refused(group, path):
    """Its forward is bound to the original, whose weights it would compute with."""
    model = tiny("llama")
    fastrot.apply(model, group)
    replica = model.get_submodule(path)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel.*use DistributedDataParallel"):
        replica(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("kind", [Caster, Splitter])
def test_a_forward_that_does_not_is_right(kind):
    model = tiny("llama")
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, "R4")
    for layer in rotated.model.layers:
        layer.mlp.__class__ = kind
    assert error(rotated, model) < 1e-5
    logits(rotated, random_ids(model, 2, 12, seed=0))
    assert getattr(rotated.model.layers[0].mlp, "calls", 2) == 2


GIVEN = "scale_of_a_tool"


class Keeper(LlamaMLP):
    """Reads what is not named in its code; changes a state that it has, and adds one."""

    def forward(self, x):
        self.calls += 1
        self.largest = x.abs().amax()
        return super().forward(x) * getattr(self, GIVEN, 1.0)


def test_a_compiled_block_has_the_state_of_an_eager_one():
    model = tiny("llama")
    fastrot.apply(model, "R4")
    eager = model.model.layers[0].mlp
    eager.__class__, eager.calls = Keeper, 0
    setattr(eager, GIVEN, 2.0)
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for seed in range(3):
        x = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        assert relative_error(compiled(x), eager(x)) < 1e-5
        assert block.calls == eager.calls == seed + 1
        assert torch.equal(block.largest, eager.largest)
    assert not {"fastrot_viewed", "down_proj"} & vars(block).keys()


def no_forward(mlp):
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def no_linear(mlp):
    mlp.down_proj = None


def no_rotation(mlp):
    del mlp.fastrot_down_proj_input


def another_module(mlp):
    mlp.fastrot_down_proj_input = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_forward, r"forward of this LlamaMLP was replaced.*down_proj_input"),
        (no_linear, r"R4 in LlamaMLP: down_proj: the module is gone"),
        (no_rotation, r"R4: model\.layers\.0\.mlp \(LlamaMLP\) does not rotate any more"),
        (another_module, r"R4: model\.layers\.0\.mlp \(LlamaMLP\) does not rotate any more"),
    ],
)
def test_what_is_taken_away_is_noticed(change, message):
    model = tiny("llama")
    fastrot.apply(model, "R4")
    change(model.model.layers[0].mlp)
    with pytest.raises(RuntimeError, match=message):
        model(random_ids(model, 1, 4, seed=0))


class Unfused(nn.Module):
    """A block that another tool made of one with the same weights, as llm-compressor of experts."""

    def __init__(self, block):
        super().__init__()
        for name, child in block.named_children():
            if not name.startswith("fastrot_"):
                setattr(self, name, child)
        self._parameters.update(block._parameters)
        self.compute = functools.partial(type(block).forward, self)
        self.has_bias, self.has_gate, self.is_transposed = False, True, False
        self.config = getattr(block, "config", None)

    def forward(self, *args, **kwargs):
        return self.compute(*args, **kwargs)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_block_that_is_replaced_as_a_whole_is_noticed(name, copied):
    model = build(FAMILIES[name], torch.float32)
    ids = random_ids(model, 2, 12, seed=0)
    fastrot.apply(model, ("R3", "R4"))
    if copied:
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    path = "model.layers.1.mlp" if name == "llama" else "model.layers.1.mlp.experts"
    block = model.get_submodule(path)
    model.set_submodule(path, Unfused(block))
    with pytest.raises(RuntimeError, match=rf"R4: {path} \(Unfused\) does not rotate any more"):
        model(ids)
    model.set_submodule(path, block)
    model(ids)
    fastrot.remove(model, "R4")
    model.set_submodule(path, nn.Identity())
    assert not model._forward_pre_hooks


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


def test_a_wrapper_around_a_block_and_layers_that_are_pruned_are_let_pass():
    model = tiny("llama", layers=3)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, "R4")
    for each in (model, rotated):
        each.model.layers = each.model.layers[:2]
    rotated.model.layers[0].mlp = Around(rotated.model.layers[0].mlp)
    assert error(rotated, model) < 1e-5


def test_a_tool_that_binds_the_function_of_a_forward_anew(pair):
    """As compressed-tensors does: it keeps ``forward.__func__`` and calls it with the module."""
    model, rotated = pair
    for module in rotated.modules():
        if any(name.startswith("fastrot_") for name, _ in module.named_children()):
            function = module.forward.__func__
            module.forward = functools.wraps(function)(
                lambda self, *a, inner=function, **k: inner(self, *a, **k)
            ).__get__(module)
    assert error(rotated, model) < 1e-5
    assert error(swap(rotated), model) < 1e-5


def test_a_forward_around_ours_is_let_pass():
    model = tiny("llama")
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, "R4")
    for layer in rotated.model.layers:
        layer.mlp.forward = (lambda inner: lambda x: inner(x))(layer.mlp.forward)
    assert error(rotated, model) < 1e-5


@pytest.mark.parametrize("name", ["Sequential", "ModuleList"])
def test_a_linear_that_is_called_by_its_place_is_refused(name):
    model = tiny("llama")
    model.model.layers[0].extra = getattr(nn, name)().append(nn.Linear(96, 96))
    config = {
        "config_groups": {
            "X": {
                "type": "hadamard",
                "apply": [{"targets": [r"re:.*extra\.0$"], "location": "input"}],
            }
        }
    }
    with pytest.raises(fastrot.RotationError, match=rf"code of .*extra \({name}\) calls '0'"):
        fastrot.plan(model, transform_config=config)


@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exported(strict):
    model = tiny("llama", dtype=torch.float64)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, ("R1", "R2", "R4"))
    model.config.use_cache = rotated.config.use_cache = False
    ids = random_ids(model, 2, 12, seed=0)
    with torch.no_grad():
        program = torch.export.export(rotated, (ids,), strict=strict)
        assert relative_error(program.module()(ids).logits, model(ids).logits) < 1e-6


def test_gradient_checkpointing():
    rotated = tiny("llama")
    fastrot.apply(rotated, GROUPS[1])
    ids = random_ids(rotated, 2, 12, seed=0)
    twin = copy.deepcopy(rotated).train()
    twin.gradient_checkpointing_enable()
    for model in (rotated, twin):
        model(ids, labels=ids).loss.backward()
    for a, b in zip(rotated.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def old_names(state):
    return {
        name.replace("fastrot_down_proj_input", "down_proj.fastrot_input"): value
        for name, value in state.items()
    }


def test_names_of_version_0_1_0_load(tmp_path):
    model = tiny("llama")
    fastrot.apply(model, GROUPS[1], transform_type="random-matrix", randomize=True)
    ids = random_ids(model, 2, 12, seed=0)
    state = old_names(model.state_dict())
    assert state.keys() != model.state_dict().keys()
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(old_names(load_file(file)), file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == model.state_dict().keys()
    for other in (twin, loaded):
        assert torch.equal(logits(other, ids), logits(model, ids))
    with pytest.raises(RuntimeError, match=r"down_proj\.fastrot_output"):
        twin.load_state_dict({**state, "model.layers.0.mlp.down_proj.fastrot_output.operand": ids})


def test_nothing_stays_behind():
    model = tiny("llama")
    fastrot.apply(model, ("R3", "R4")).remove()
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks


def on(location, *targets):
    return {"targets": list(targets), "location": location}


def test_several_linears_of_one_block_and_the_head():
    model = tiny("llama", dtype=torch.float64)
    rotated = copy.deepcopy(model)
    ends = (r"re:.*self_attn\.o_proj$", r"re:.*self_attn\.v_proj$", r"re:.*lm_head$")
    groups = {}
    for index, target in enumerate(ends):
        apply = [on("input", target), {**on("weight_input", target), "inverse": True}]
        groups[f"IN{index}"] = {"type": "random-matrix", "apply": apply}
        apply = [{**on("output", target), "inverse": True}, on("weight_output", target)]
        groups[f"OUT{index}"] = {"type": "random-matrix", "apply": apply}
    handle = fastrot.apply(rotated, transform_config={"config_groups": groups})
    assert error(rotated, model) < 1e-6
    ids = random_ids(model, 1, 4, seed=0)
    tokens = [
        m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, rotated)
    ]
    assert torch.equal(*tokens)
    assert error(swap(copy.deepcopy(rotated)).double(), model) < 1e-6
    handle.remove()
    assert error(rotated, model) < 1e-6
