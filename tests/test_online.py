"""Online rotations are real submodules that survive what is done to modules, and come off."""

import copy
import io
import pickle

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from test_exact import ROTATIONS

import fastrot
from fastrot.online import OnlineRotation, installed
from fastrot.rotations import KINDS


@pytest.fixture(params=KINDS)
def pair(request):
    model = tiny("llama", dtype=torch.float32)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, ROTATIONS, transform_type=request.param, randomize=True)
    return model, rotated


def test_visible_before_the_first_forward(pair):
    _, rotated = pair
    names = [name for name, module in rotated.named_modules() if isinstance(module, OnlineRotation)]
    assert "model.layers.0.mlp.fastrot_down_proj_input" in names
    assert "model.layers.1.self_attn.fastrot_q_attn" in names
    assert len(names) == 3 * len(rotated.model.layers)
    assert "R4, " in repr(rotated)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_are_complete_and_independent(pair, duplicate):
    _, rotated = pair
    ids = random_ids(rotated, 2, 12, seed=0)
    before = logits(rotated, ids)
    twin = duplicate(rotated)
    assert torch.equal(logits(twin, ids), before)
    fastrot.remove(twin)
    assert torch.equal(logits(rotated, ids), before)
    assert not list(installed(twin))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype(pair, dtype):
    """A cast model rotates as well as one that was cast before."""
    model, rotated = pair
    ids = random_ids(model, 4, 16, seed=0)
    exact = logits(copy.deepcopy(model).double(), ids)
    plain = relative_error(logits(copy.deepcopy(model).to(dtype), ids), exact)
    cast = relative_error(logits(rotated.to(dtype), ids), exact)
    # A float32 weight rounded twice: fusing rounds to float32 before the cast.
    assert cast <= 1.6 * plain + 2e-6


def test_operands_are_not_rounded_by_a_cast(pair):
    _, rotated = pair
    operands = {n: b.clone() for n, b in rotated.named_buffers() if n.endswith("operand")}
    rotated.to(torch.bfloat16)
    after = dict(rotated.named_buffers())
    assert all(torch.equal(after[name], operand) for name, operand in operands.items())


def test_gradients_pass_through(pair):
    """d loss / d embedding of the rotated model is that of the original, rotated by R1."""
    model, rotated = pair
    ids = random_ids(model, 2, 12, seed=0)
    for m in (model, rotated):
        m(ids, labels=ids).loss.backward()
    before, after = (m.get_input_embeddings().weight.grad for m in (model, rotated))
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-3, atol=1e-6)
    grams = [g @ g.T for g in (before, after)]
    torch.testing.assert_close(grams[1], grams[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("group", ["R3", "R4"])
def test_remove_one_of_them(pair, group):
    model, rotated = pair
    ids = random_ids(model, 2, 12, seed=0)
    fastrot.remove(rotated, [group])
    assert group not in {rotation.group for _, _, rotation in installed(rotated)}
    assert relative_error(logits(rotated, ids), logits(model, ids)) < 1e-5
    fastrot.apply(rotated, group)
    assert relative_error(logits(rotated, ids), logits(model, ids)) < 1e-5


def test_r3_leaves_without_a_trace():
    model = tiny("llama")
    names = set(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    fastrot.apply(model, "R3").remove()
    assert set(model.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "quantization_config")


def test_remove_twice_is_refused():
    handle = fastrot.apply(tiny("llama"), ("R1", "R3"))
    handle.remove()
    with pytest.raises(ValueError, match=r"R3 is not online .*\(online: none\)"):
        handle.remove()


def test_remove_without_online_rotations_is_refused():
    handle = fastrot.apply(tiny("llama"), ("R1", "R2"))
    with pytest.raises(ValueError, match="nothing of this is online"):
        handle.remove()


def test_r4_compiles_in_one_graph(pair):
    _, rotated = pair
    mlp = copy.deepcopy(rotated.model.layers[0].mlp)
    x = torch.randn(3, 5, rotated.config.hidden_size)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), mlp(x), rtol=1e-4, atol=1e-5)
