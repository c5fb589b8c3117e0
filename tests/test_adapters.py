"""Adapters of PEFT on rotated models: put on before or after rotation, merged, unmerged, saved.

After rotation an adapter sees what its linear sees, the rotated input: merged is unmerged. One that
was put on before is refused, as its weights are of the unrotated spaces, until it is merged.
"""

import copy
import warnings

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot.online import installed

GROUPS = {"R1R2": ("R1", "R2"), "R4": ("R4",), "R1-R4": ("R1", "R2", "R3", "R4")}
MODELS = {
    "llama": lambda: tiny("llama"),
    "qwen2_moe": lambda: build(FAMILIES["qwen2_moe"], torch.float32),
}
LINEARS = "all-linear"
READERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "lora": lambda: LoraConfig(r=4, target_modules=LINEARS),
    "dora": lambda: LoraConfig(r=4, target_modules=LINEARS, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=READERS, feedforward_modules=["down_proj"]),
    "experts": lambda: LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS),
}
CELLS = [(k, n) for k in KINDS for n in MODELS if k != "experts" or n == "qwen2_moe"]
SAME = 1e-5
NONSENSE = "adapter 'default' is loaded onto a rotated model"


@pytest.fixture(params=CELLS, ids="-".join)
def cell(request):
    kind, name = request.param
    return KINDS[kind], MODELS[name]()


@pytest.fixture(params=GROUPS)
def groups(request):
    return GROUPS[request.param]


def rotated(model, groups):
    twin = copy.deepcopy(model)
    fastrot.apply(twin, groups, randomize=True)
    return twin


def trained(peft):
    """Adapter weights of a size that shows, and a step of training, by which all of them change."""
    generator = torch.Generator().manual_seed(0)
    adapters = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    for name, p in adapters.items():
        if "magnitude" not in name:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    before = {name: p.detach().clone() for name, p in adapters.items()}
    optimizer = torch.optim.SGD(adapters.values(), lr=0.1)
    ids = random_ids(peft, 2, 12, seed=1)
    peft.train()
    peft(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in adapters.items())
    return peft.eval()


def test_an_adapter_that_does_nothing_yet(cell, groups):
    config, model = cell
    peft = get_peft_model(rotated(model, groups), config())
    ids = random_ids(model, 2, 12, seed=0)
    assert relative_error(logits(peft, ids), logits(model, ids)) <= SAME


def test_after_rotation_merged_is_unmerged(cell, groups):
    config, model = cell
    peft = trained(get_peft_model(rotated(model, groups), config()))
    ids = random_ids(model, 2, 12, seed=0)
    expected = logits(peft, ids)
    assert relative_error(logits(model, ids), expected) > 0.01
    peft.merge_adapter()
    assert relative_error(logits(peft, ids), expected) <= SAME
    peft.unmerge_adapter()
    assert relative_error(logits(peft, ids), expected) <= SAME
    with peft.disable_adapter():
        assert relative_error(logits(peft, ids), logits(model, ids)) <= SAME
    assert relative_error(logits(peft.merge_and_unload(), ids), expected) <= SAME


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_rotation_that_the_adapter_does_not_see_shows(kind, name):
    """Negative control: R4 on the linear itself, below the adapter."""
    model = rotated(MODELS[name](), ("R4",))
    peft = trained(get_peft_model(model, KINDS[kind]()))
    for _, holder, rotation in list(installed(peft)):
        if rotation.child is not None:
            del holder.__dict__["forward"]
            holder._forward_pre_hooks.clear()
            linear = holder.get_submodule(rotation.child).base_layer
            linear.register_forward_pre_hook(lambda m, args, r=rotation: (r(args[0]), *args[1:]))
    ids = random_ids(model, 2, 12, seed=0)
    unmerged = logits(peft, ids)
    peft.merge_adapter()
    assert relative_error(logits(peft, ids), unmerged) > 0.01


def test_after_rotation_saved_and_loaded(cell, groups, tmp_path):
    config, model = cell
    rotated(model, groups).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = trained(get_peft_model(base, config()))
    ids = random_ids(model, 2, 12, seed=0)
    expected = logits(peft, ids)
    peft.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=NONSENSE)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, ids), expected)
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(logits(merged, ids), expected) <= SAME


@pytest.mark.parametrize("way", ["peft", "transformers"])
@pytest.mark.parametrize("rotate", ["in memory", "on disk"])
def test_trained_on_the_unrotated_model_is_warned_of(rotate, way, tmp_path):
    """The same names and shapes, and nonsense; the unrotated model takes it without a word."""
    tiny("llama").save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    peft = trained(get_peft_model(plain, KINDS["lora"]()))
    peft.save_pretrained(tmp_path / "adapter")
    ids = random_ids(plain, 2, 12, seed=0)
    expected = logits(peft, ids)

    def load(folder, apply=False):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if apply:
            fastrot.apply(model)
        if way == "peft":
            return PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        model.load_adapter(tmp_path / "adapter")
        return model.eval()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=NONSENSE)
        assert relative_error(logits(load(tmp_path / "plain"), ids), expected) <= SAME
    fastrot.rotate_checkpoint(tmp_path / "plain", tmp_path / "on disk")
    late = rotate == "in memory"
    with pytest.warns(UserWarning, match=NONSENSE):
        model = load(tmp_path / ("plain" if late else rotate), late)
    assert relative_error(logits(model, ids), expected) > 0.1


@pytest.mark.parametrize("state", ["unmerged", "merged", "injected"])
def test_before_rotation_is_refused_until_it_is_merged(cell, groups, state):
    config, model = cell
    if state == "injected":
        inject_adapter_in_model(config(), model)
        wrapped = [model]
    else:
        peft = trained(get_peft_model(model, config()))
        wrapped = [peft, peft.base_model, model]
        ids = random_ids(model, 2, 12, seed=0)
        expected = logits(peft, ids)
    if state == "merged":
        peft.merge_adapter()
    before = fingerprint(model)
    for each in wrapped:
        for action in (fastrot.plan, fastrot.apply):
            with pytest.raises(fastrot.RotationError, match=r"adapters.*merge_and_unload\(\)"):
                action(each, groups)
    assert difference(before, fingerprint(model)) == []
    if state != "injected":
        whole = peft.merge_and_unload()
        fastrot.apply(whole, groups, randomize=True)
        assert relative_error(logits(whole, ids), expected) <= SAME


def test_an_adapter_that_was_taken_off_before(cell, groups):
    config, model = cell
    ids = random_ids(model, 2, 12, seed=0)
    expected = logits(model, ids)
    bare = trained(get_peft_model(model, config())).unload()
    fastrot.apply(bare, groups)
    assert relative_error(logits(bare, ids), expected) <= SAME


def test_rotations_stay_on_under_an_adapter(cell):
    """R4 leaves through the weights that an adapter was trained beside."""
    config, model = cell
    peft = trained(get_peft_model(rotated(model, GROUPS["R1-R4"]), config()))
    inner = peft.base_model.model
    before = fingerprint(inner)
    for each in (peft, inner):
        with pytest.raises(fastrot.RotationError, match=r"adapters.*merge_and_unload\(\)"):
            fastrot.remove(each)
    assert difference(before, fingerprint(inner)) == []
    whole = peft.merge_and_unload()
    ids = random_ids(model, 2, 12, seed=0)
    expected = logits(whole, ids)
    fastrot.remove(whole)
    assert relative_error(logits(whole, ids), expected) <= SAME


def test_two_adapters_on_one_model(groups):
    model = tiny("llama")
    peft = get_peft_model(rotated(model, groups), KINDS["lora"](), adapter_name="one")
    peft.add_adapter("two", KINDS["lora"]())
    peft.base_model.set_adapter(["one", "two"])
    trained(peft)
    ids = random_ids(model, 2, 12, seed=0)
    expected = logits(peft, ids)
    peft.merge_adapter(["one"])
    peft.merge_adapter(["two"])
    assert relative_error(logits(peft, ids), expected) <= SAME
    assert isinstance(peft, PeftModel)
