"""What is learned from is gathered in bounded memory, and is what it would be without bounds."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from helpers import random_ids, tiny
from test_learning_refine import ALL, loss_of, turned_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from zoo import FAMILIES, build

import fastrot
from fastrot.lab.fisher import descend_from_own_words, only_activations
from fastrot.lab.layerwise import layerwise
from fastrot.lab.outliers import SITES, observed
from fastrot.lab.schemes import Scheme
from fastrot.learning import refine
from fastrot.learning.capture import Site, capture

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
    """As with the graph of all layers in memory: vectors, energies, and those of the weights."""
    model = build(FAMILIES[name], torch.float32)
    fastrot.apply(model, "R4")
    ids = random_ids(model, 3, 12, seed=0)
    found = capture(model, ids, set(SITES), 3 * 12, 1)
    expected: dict[Site, list[Tensor]] = {}

    def see(site, layer, x):
        seen = x.detach().flatten(0, -2)

        def note(gradient):
            energies = gradient.square().sum(-1).flatten() / (3 * 12)
            both = torch.cat([seen, energies[:, None]], -1)
            expected.setdefault((site, layer), []).append(both)

        x.register_hook(note)

    generator = torch.Generator().manual_seed(1)
    with only_activations(model), observed(model, see):
        for window in ids.split(1):
            descend_from_own_words(model, window, generator)
    assert found.samples.keys() == expected.keys()
    for site, (vectors, shares) in found.samples.items():
        got = torch.cat([vectors, shares[:, None]], -1)
        wanted = torch.cat(expected[site])
        for column in (-1, 0):  # the same token twice is the same vector in the first layer
            got, wanted = (x[x[:, column].argsort(stable=True)] for x in (got, wanted))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert shares.max() > 0
    monkeypatch.setattr(captures, "layerwise", whole)
    weights = capture(model, ids, set(), 3 * 12, 1).weights
    assert found.weights == pytest.approx(weights, rel=1e-5)
    assert min(weights.values()) > 0


def test_a_layer_costs_its_input(monkeypatch):
    def of(layers, sites=()):
        model = tiny("llama", dtype=torch.float32, layers=layers)
        ids = random_ids(model, 1, 12, seed=0)
        return saved(lambda: capture(model, ids, set(sites), 8, 0))

    size = 12 * 96 * 4
    assert of(5, SITES) - of(2, SITES) == 3 * size
    monkeypatch.setattr(captures, "layerwise", whole)
    assert of(5) - of(2) > 30 * size


def test_more_windows_than_vectors(monkeypatch):
    """Vectors come from windows that are equally far apart."""
    model = tiny("llama", dtype=torch.float32)
    ids = random_ids(model, 10, 12, seed=0)
    energy = torch.ones(1)
    monkeypatch.setattr(captures, "drawn", lambda *_: (torch.tensor([5]), energy))
    vectors, shares = capture(model, ids, {"mlp"}, 4, 0).samples["mlp", 1]
    torch.testing.assert_close(shares, energy.expand(4) / (4 * 12))
    assert len(vectors) == 4
    for vector, window in zip(vectors, ids[::3], strict=True):
        seen = {}
        with torch.no_grad(), observed(model, lambda *x, seen=seen: seen.update({x[:2]: x[2]})):
            model(window[None])
        assert (seen["mlp", 1][0] - vector).abs().amax(-1).min() < 1e-5


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
