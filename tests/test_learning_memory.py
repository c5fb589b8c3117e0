"""What is learned from is gathered in bounded memory, and is what it would be without bounds."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from helpers import random_ids, tiny
from test_learning_refine import ALL, loss_of, turned_model
from torch.autograd.graph import saved_tensors_hooks
from zoo import FAMILIES, build

import fastrot
from fastrot.lab.layerwise import layerwise
from fastrot.lab.outliers import SITES, observed
from fastrot.lab.schemes import Scheme
from fastrot.learning import refine
from fastrot.learning.capture import QUANTILE, ClippedMean, capture

captures = import_module("fastrot.learning.capture")
MODELS = ("llama", "gpt2", "gemma2", "gemma4_shared", "minicpm3")


@contextmanager
def whole(model):
    """The graph of all layers, kept until the way back: the oracle."""
    yield


def saved(run):
    """Bytes that graphs keep outside of what is run again."""
    total = 0

    def pack(x):
        nonlocal total
        total += x.nbytes
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_the_same_is_captured(name, monkeypatch):
    model = build(FAMILIES[name], torch.float32)
    fastrot.apply(model, "R4")
    given = model, random_ids(model, 3, 12, seed=0), set(SITES), 10, 1
    found = capture(*given)
    monkeypatch.setattr(captures, "layerwise", whole)
    expected = capture(*given)
    assert found.vectors.keys() == expected.vectors.keys()
    for site, vectors in found.vectors.items():
        assert torch.equal(vectors, expected.vectors[site]), site
    assert found.energies == pytest.approx(expected.energies, rel=1e-5)
    assert found.weights == pytest.approx(expected.weights, rel=1e-5)
    assert min(expected.energies.values()) > 0


def test_a_layer_costs_its_input(monkeypatch):
    def of(layers):
        model = tiny("llama", dtype=torch.float32, layers=layers)
        ids = random_ids(model, 1, 12, seed=0)
        return saved(lambda: capture(model, ids, set(SITES), 8, 0))

    size = 12 * 96 * 4
    assert of(5) - of(2) == 3 * size
    monkeypatch.setattr(captures, "layerwise", whole)
    assert of(5) - of(2) > 30 * size


def test_more_windows_than_vectors():
    """Vectors come from windows that are equally far apart."""
    model = tiny("llama", dtype=torch.float32)
    ids = random_ids(model, 10, 12, seed=0)
    vectors = capture(model, ids, {"mlp"}, 4, 0).vectors["mlp", 1]
    assert len(vectors) == 4
    for vector, window in zip(vectors, ids[::3], strict=True):
        seen = {}
        with torch.no_grad(), observed(model, lambda *x, seen=seen: seen.update({x[:2]: x[2]})):
            model(window[None])
        assert (seen["mlp", 1][0] - vector).abs().amax(-1).min() < 1e-5


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 1000])
def test_clipped_mean(count):
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(count)).exp()
    most = numbers.kthvalue(max(1, int(QUANTILE * count))).values
    mean = ClippedMean(count)
    for part in numbers.split(17):
        mean.add(part)
        assert len(mean.largest) <= 2 + count // 100
    assert mean.result() == pytest.approx(float(numbers.clamp(max=float(most)).mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4_shared"])
def test_the_gradients_of_the_second_descent(name, monkeypatch):
    model = build(FAMILIES[name], torch.float64)
    ids = random_ids(model, 2, 12, seed=1)
    recipe = fastrot.Recipe(ALL)
    if name == "gemma4_shared":  # whose heads have two sizes
        recipe = fastrot.Recipe(("R2", "R3"), block_size={"R2": 8, "R3": 8})
    rotated, plan, turns, _ = turned_model(model, recipe, torch.Generator().manual_seed(0))
    leaves = {place: q.requires_grad_() for place, q in turns.items()}

    def gradients():
        with refine.simulated(rotated, plan, Scheme.parse("w4a4kv4")) as loss:
            return torch.autograd.grad(loss(leaves, ids), list(leaves.values()))

    found, kept = gradients(), saved(gradients)
    monkeypatch.setattr(refine, "layerwise", whole)
    for got, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 0
    assert kept < saved(gradients)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    model = tiny("llama", dtype=torch.float32)
    plan = fastrot.apply(model, ALL).plan
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    weights, ids = dict(model.named_parameters()), random_ids(model, 2, 12, seed=1)
    loss = float(loss_of(model, ids))
    try:
        with refine.simulated(model, plan, Scheme.parse("w4a4kv4")) as simulated:
            assert float(simulated({}, ids)) != loss
            assert "forward" in vars(model.model.layers[0])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    for name, module in model.named_modules():
        kind, own = before[name]
        assert (type(module), vars(module).keys()) == (kind, own.keys()), name
    assert all(weights[name] is p for name, p in model.named_parameters())
    assert float(loss_of(model, ids)) == loss


def test_a_forward_of_its_own_comes_back():
    model = tiny("llama")
    layer = model.model.layers[0]
    layer.forward = own = layer.forward
    with layerwise(model):
        assert layer.forward is not own
    assert vars(layer)["forward"] is own
