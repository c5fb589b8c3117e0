"""GPTQ: what it must be without correlations, and what it gains with them."""

import pytest
import torch
from helpers import difference, fingerprint, levels, random_ids, tiny
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from fastrot import RotationError
from fastrot.demo.evaluate import MODEL, heldout_windows
from fastrot.lab import gptq as module
from fastrot.lab.evaluate import compare, evaluate
from fastrot.lab.gptq import calibrated, gptq
from fastrot.lab.quantized import linears_of, quantized
from fastrot.lab.quantizers import fake_quantize
from fastrot.lab.schemes import Numbers, Scheme

INT4 = Numbers(gptq=True)
GROUPS = Numbers(per="group", group=12, symmetric=False, gptq=True)
CLIPPED = Numbers(clip="mse", gptq=True)


def weight(dtype=torch.float64):
    return torch.randn(20, 48, dtype=dtype, generator=torch.Generator().manual_seed(0))


def inputs(count=400):
    """Correlated, as activations are."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(48, 48, dtype=torch.float64, generator=generator)
    return torch.randn(count, 48, dtype=torch.float64, generator=generator) @ mix


@pytest.mark.parametrize("numbers", [INT4, GROUPS, CLIPPED])
def test_without_correlations_it_is_rounding_to_nearest(numbers):
    moments = torch.diag(torch.rand(48, dtype=torch.float64) + 0.5)
    got = gptq(weight(), moments, numbers)
    nearest = Numbers(**{**vars(numbers), "gptq": False})
    torch.testing.assert_close(got, fake_quantize(weight(), nearest), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [INT4, GROUPS, CLIPPED])
def test_products_change_less(numbers):
    x, w = inputs(), weight()
    rounded = gptq(w, x.T @ x, numbers)
    nearest = fake_quantize(w, Numbers(**{**vars(numbers), "gptq": False}))
    errors = [float((x @ (other - w).T).norm()) for other in (rounded, nearest)]
    assert errors[0] < 0.8 * errors[1]
    assert not torch.equal(rounded, nearest)
    per = 12 if numbers.group else 48
    assert levels(rounded.unflatten(1, (-1, per))) <= 16


@pytest.mark.parametrize("numbers", [INT4, GROUPS])
@pytest.mark.parametrize("block", [1, 5, 12, 16, 47])
def test_blocks_change_nothing(numbers, block, monkeypatch):
    x = inputs()
    whole = gptq(weight(), x.T @ x, numbers)
    monkeypatch.setattr(module, "BLOCK", block)
    torch.testing.assert_close(gptq(weight(), x.T @ x, numbers), whole, rtol=1e-9, atol=1e-9)


def test_inputs_that_are_always_zero():
    x = inputs()
    x[:, 7] = 0
    assert gptq(weight(), x.T @ x, INT4).isfinite().all()
    assert gptq(weight(), torch.zeros(48, 48), INT4).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_refused(value):
    model = tiny("llama")
    model.model.layers[0].self_attn.o_proj.weight.data[3, 5] = value
    before = fingerprint(model)
    message = r"layers\.0\.mlp\.gate_proj\.weight: the second moments of its inputs are not finite"
    windows = random_ids(model, 2, 12, seed=0)
    with pytest.raises(RotationError, match=message), quantized(model, "w4gptq", windows):
        pass
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_moments_are_those_of_all_inputs(room, monkeypatch):
    """In as many passes as there is room for."""
    monkeypatch.setattr(module, "ROOM", room)
    model = tiny("llama")
    windows = random_ids(model, 3, 10, seed=0)
    linears = linears_of(model)
    seen = {name: [] for name in linears}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, m in linears.items()
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    found = dict(calibrated(model, linears, windows))
    assert found.keys() == linears.keys()
    for name, (x,) in seen.items():
        x = x.flatten(0, 1)
        torch.testing.assert_close(found[name], x.T @ x, rtol=1e-4, atol=1e-4)


def test_a_trained_model_loses_less_and_comes_back():
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    windows = heldout_windows(8192)
    before = fingerprint(model)
    losses = {}
    for name in ("w3", "w3gptq"):
        with quantized(model, name, windows[: len(windows) // 2]):
            losses[name] = evaluate(model, windows[len(windows) // 2 :])
    assert difference(before, fingerprint(model)) == []
    gain = compare(losses["w3gptq"], losses["w3"])
    assert gain.mean < 0
    assert gain.is_clear


def test_of_conv1d():
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=64)).eval()
    windows = random_ids(model, 2, 12, seed=0)
    with quantized(model, "w4gptq", windows):
        rounded = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    assert rounded.shape == (48, 192)
    assert levels(rounded.T) <= 15


def test_names_and_refusals():
    scheme = Scheme.parse("w4g32msegptq-a8")
    assert scheme.weights == Numbers("int", 4, "group", 32, True, "mse", True)
    assert str(scheme) == "w4g32msegptq-a8"
    for name in ("a4gptq", "kv4gptq", "wfp8gptq", "w4tgptq"):
        with pytest.raises(RotationError, match="gptq"):
            Scheme.parse(name)
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(RotationError, match="gptq needs text"), quantized(model, "w4gptq"):
        pass
    windows = random_ids(model, 2, 12, seed=0)
    with (
        pytest.raises(RotationError, match=r"weight: .*groups of 7"),
        quantized(model, "w4g7gptq", windows),
    ):
        pass
    assert difference(before, fingerprint(model)) == []
