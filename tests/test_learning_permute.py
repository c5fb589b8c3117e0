"""Orders of channels by which all blocks of R4 hold as much: found, judged, kept in the recipe."""

import copy

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from transformers import LlamaForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot import Learned, Recipe, Rotation
from fastrot.demo.corpus import heldout_files, read_bytes
from fastrot.demo.evaluate import MODEL
from fastrot.lab.corpus import cut
from fastrot.lab.evaluate import evaluate
from fastrot.lab.quantized import quantized
from fastrot.learning import learner
from fastrot.learning.balance import balanced, orders_of

BLOCK = 28
OPTIONS = {"block_size": {"R4": BLOCK}}
PERMUTE = {
    "scheme": "a4",
    "block_size": {"R4": 16},
    "steps": 0,
    "refine": 0,
    "permute": True,
}


def crowded():
    """A model whose MLPs have all their strong channels in the first block."""
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:BLOCK] *= 16
            layer.mlp.up_proj.bias[:BLOCK] *= 16
    return model


def reordered(model, orders):
    """The same function with the channels of every MLP in another order, without fastrot."""
    model = copy.deepcopy(model)
    for layer, order in zip(model.model.layers, orders, strict=True):
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data = linear.weight.data[order]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order]
    return model


@pytest.fixture(scope="module")
def model():
    return crowded()


@pytest.fixture(scope="module")
def text():
    return random_ids(crowded(), 16, 24, seed=3)


@pytest.fixture(scope="module")
def trained():
    """The embedded model with its channels as they come, and Python code in bytes."""
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    stream = torch.tensor(read_bytes(heldout_files())).long()
    return model, cut(stream, 96, 32 * 96)


@pytest.fixture(scope="module")
def uneven(trained):
    """The same function with the channels of the first block sixteen times as large."""
    model = copy.deepcopy(trained[0])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:16] *= 16
            layer.mlp.down_proj.weight[:, :16] /= 16
    return model


@pytest.fixture(scope="module")
def learned(uneven, trained):
    return fastrot.learn(uneven, trained[1], "R4", **PERMUTE)


def masses(model, text):
    """Of the channels of every MLP."""
    sums = [torch.zeros(layer.mlp.down_proj.in_features) for layer in model.model.layers]

    def adding(total):
        def hook(_, args):
            total.add_(args[0].abs().flatten(0, -2).sum(0))

        return hook

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(adding(total))
        for layer, total in zip(model.model.layers, sums, strict=True)
    ]
    with torch.no_grad():
        model(text)
    for hook in hooks:
        hook.remove()
    return [total.double() for total in sums]


@pytest.mark.parametrize(("channels", "block"), [(96, 8), (112, 28), (64, 64), (7, 1)])
def test_blocks_hold_as_much(channels, block):
    generator = torch.Generator().manual_seed(channels)
    mass = torch.rand(channels, generator=generator, dtype=torch.float64) ** 8
    order = balanced(mass, block)
    assert torch.equal(order.sort().values, torch.arange(channels))
    held = mass[order].view(-1, block).sum(1)
    assert held.max() - held.min() <= mass.max() + 1e-12
    uneven = mass.sort().values.view(-1, block).sum(1)
    assert held.std(correction=0) <= uneven.std(correction=0) + 1e-12


def test_the_masses_are_those_before_r4(model, text):
    """Of a rotated model, where R4 turned them already: the same orders as of the original."""
    rotated = copy.deepcopy(model)
    plan = fastrot.apply(rotated, ("R1", "R4"), transform_type="random-hadamard", **OPTIONS).plan
    for order, total in zip(orders_of(rotated, plan, text), masses(model, text), strict=True):
        held, expected = (total[o].view(-1, BLOCK).sum(1) for o in (order, balanced(total, BLOCK)))
        torch.testing.assert_close(held, expected, rtol=1e-4, atol=0)
        crowd = [int((part < BLOCK).sum()) for part in order.view(-1, BLOCK)]
        assert max(crowd) - min(crowd) <= 3


def test_taken_where_it_helps(uneven, trained, learned):
    _, text = trained
    assert learned.accepted
    assert not learned.matrices
    assert len(learned.permutations["R4"]) == len(uneven.model.layers)
    assert learned.gain.mean < -2 * learned.gain.error < 0
    assert "permutations taken" in str(learned)
    losses = []
    for recipe in (Recipe("R4", block_size=PERMUTE["block_size"]), learned):
        rotated = copy.deepcopy(uneven)
        fastrot.apply(rotated, recipe)
        assert relative_error(logits(rotated, text), logits(uneven, text)) <= 1e-5
        with quantized(rotated, PERMUTE["scheme"]):
            losses.append(evaluate(rotated, text[3::4]).mean)
    assert losses[1] - losses[0] == pytest.approx(learned.gain.mean, abs=1e-4)


def test_left_where_it_does_not(uneven, trained, learned, monkeypatch):
    """From the balanced order back to the one before."""
    orders = [order.operand for order in learned.permutations["R4"]]
    even = reordered(uneven, orders)
    monkeypatch.setattr(learner, "orders_of", lambda *_: [o.argsort() for o in orders])
    left = fastrot.learn(even, trained[1], "R4", **PERMUTE)
    assert not left.accepted
    assert left.gain.mean > 0
    assert left == Learned("R4", block_size=PERMUTE["block_size"])


def test_matrices_are_learned_behind_it(uneven, trained):
    _, text = trained
    both = fastrot.learn(uneven, text, ("R1", "R4"), **PERMUTE | {"steps": 40, "vectors": 128})
    assert both.permutations
    assert len(both.history) == 40
    rotated = copy.deepcopy(uneven)
    fastrot.apply(rotated, both)
    assert relative_error(logits(rotated, text), logits(uneven, text)) <= 1e-5


def test_save_and_load(learned, uneven, tmp_path):
    path = tmp_path / "orders.safetensors"
    width = uneven.config.hidden_size
    matrices = {"R1": Rotation("random-matrix", width, seed=1).operand}
    given = {"matrices": matrices, "permutations": learned.permutations}
    both = Learned(("R1", "R4"), **given, taken=("matrices",))
    for recipe in (learned, both):
        recipe.save(path)
        loaded = Learned.load(path)
        assert loaded == recipe
        assert loaded.accepted
        assert fastrot.plan(uneven, loaded) == fastrot.plan(uneven, recipe)


@pytest.mark.parametrize(
    ("name", "rotations", "options", "message"),
    [
        ("llama", "R4", {}, r"R4 \(hadamard 112\) has one block.*block_size={'R4': 32}"),
        ("llama", ("R1", "R2"), {}, "permute=True is of R4, which the recipe does not have"),
        ("mixtral", "R4", {"block_size": {"R4": 8}}, "not in an MLP of linear modules"),
        (
            "llama",
            "R4",
            OPTIONS | {"permutations": {"R4": torch.arange(112)}},
            "the recipe has permutations already",
        ),
    ],
)
def test_refused(name, rotations, options, message, text):
    model = crowded() if name == "llama" else build(FAMILIES[name], torch.float32)
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.learn(model, text, rotations, scheme="a4", permute=True, **options)
    assert difference(before, fingerprint(model)) == []
