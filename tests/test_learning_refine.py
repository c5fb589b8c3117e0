"""The second descent: the loss it goes down is that of the quantized model, to rounding."""

import copy

import pytest
import torch
from helpers import random_ids, tiny
from torch.nn.functional import cross_entropy
from zoo import FAMILIES, build

import fastrot
from fastrot import Recipe
from fastrot.lab.evaluate import Difference, Losses
from fastrot.lab.quantized import quantized
from fastrot.lab.quantizers import fake_quantize
from fastrot.lab.schemes import Numbers, Scheme
from fastrot.learning import descents, learner
from fastrot.learning.orthogonal import cayley, polished
from fastrot.learning.refine import simulated, straight_through
from fastrot.learning.terms import bases
from fastrot.rotations.stages import dense

ALL = ("R1", "R2", "R3", "R4")


def turned_model(model, rotations, generator, size=0.05):
    """Some turns, and the matrices of the rotation that has them behind it."""
    rotated = copy.deepcopy(model)
    plan = fastrot.apply(rotated, rotations).plan
    turns, matrices = {}, {}
    for name, each in bases(plan, rotated).items():
        for layer, base in each.items():
            skew = torch.randn(base.block, base.block, dtype=torch.float64, generator=generator)
            if base.fixes_ones:
                skew = skew - skew.mean(-1, keepdim=True)
                skew = skew - skew.mean(0)
            turns[name, layer] = cayley(size * (skew - skew.mT))
            matrices.setdefault(name, []).append(
                polished(dense(base.stages()) @ turns[name, layer])
            )
    return rotated, plan, turns, matrices


def loss_of(model, ids):
    logits = model(input_ids=ids[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("scheme", ["a4", "w4g16", "kv4", "w4a4kv4", "w8-a4-kv4sym"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_loss_is_that_of_a_model_rotated_so(name, scheme):
    """In float64, where a number between two levels is on the same side both times."""
    generator = torch.Generator().manual_seed(0)
    model = build(FAMILIES[name], torch.float64)
    ids = random_ids(model, 2, 12, seed=1)
    rotated, plan, turns, matrices = turned_model(model, ALL, generator)
    other = copy.deepcopy(model)
    fastrot.apply(other, Recipe(ALL, matrices=matrices))
    with torch.no_grad():
        with quantized(other, scheme):
            expected = float(loss_of(other, ids))
        with quantized(rotated, scheme):
            before = float(loss_of(rotated, ids))
        with simulated(rotated, plan, Scheme.parse(scheme)) as loss:
            assert float(loss(turns, ids)) == pytest.approx(expected, abs=1e-6)
            still = {key: torch.eye(len(q), dtype=q.dtype) for key, q in turns.items()}
            assert float(loss(still, ids)) == pytest.approx(before, abs=1e-6)
    assert abs(before - expected) > 1e-4
    with torch.no_grad():
        assert float(loss_of(rotated, ids)) == pytest.approx(float(loss_of(model, ids)), abs=1e-6)


@pytest.mark.parametrize("scheme", ["kv4", "w4a4kv4"])
def test_latents(scheme):
    """What is cached of them is turned by R3, and R2 turns none of it."""
    generator = torch.Generator().manual_seed(0)
    model = build(FAMILIES["minicpm3"], torch.float64)
    ids = random_ids(model, 2, 12, seed=1)
    rotated, plan, turns, matrices = turned_model(model, ("R2", "R3"), generator)
    fastrot.apply(model, Recipe(("R2", "R3"), matrices=matrices))
    with torch.no_grad():
        with quantized(model, scheme):
            expected = float(loss_of(model, ids))
        with simulated(rotated, plan, Scheme.parse(scheme)) as loss:
            assert float(loss(turns, ids)) == pytest.approx(expected, abs=1e-6)
            assert abs(float(loss({}, ids)) - expected) > 1e-4


def test_weights_of_gptq_are_left():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=1)
    plan = fastrot.apply(model, ALL).plan
    with torch.no_grad():
        with simulated(model, plan, Scheme.parse("w4gptq-a4")) as loss:
            got = float(loss({}, ids))
        with quantized(model, "a4"):
            assert got == pytest.approx(float(loss_of(model, ids)), abs=1e-9)


def test_gradients_go_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    got = straight_through(x, Numbers())
    torch.testing.assert_close(got, fake_quantize(x.detach(), Numbers()))
    got.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert straight_through(x, None) is x


@pytest.fixture
def uneven():
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] *= 20
    return model


def test_it_goes_down(uneven, monkeypatch):
    """On one window, from random signs; the matrices that come out have the loss they promise."""
    monkeypatch.setattr(learner, "compare", lambda *_: Difference(-1.0, 0.0))
    text = random_ids(uneven, 9, 24, seed=3)
    learned = fastrot.learn(
        uneven,
        text[:1],
        ALL,
        heldout=text[1:],
        scheme="w4a4kv4",
        transform_type="random-hadamard",
        steps=0,
        refine=40,
    )
    assert len(learned.history) == 40
    assert learned.defect <= 1e-12
    start = torch.tensor(learned.history[:5]).mean()
    assert torch.tensor(learned.history[-5:]).mean() < start - 0.05
    fastrot.apply(uneven, learned)
    with torch.no_grad(), quantized(uneven, "w4a4kv4"):
        assert float(loss_of(uneven, text[:1])) < start - 0.05


def test_without_steps_next_to_nothing_is_captured(uneven, monkeypatch):
    seen = []
    capture = descents.capture

    def counting(model, windows, *rest):
        seen.append(len(windows))
        return capture(model, windows, *rest)

    monkeypatch.setattr(descents, "capture", counting)
    text = random_ids(uneven, 16, 24, seed=3)
    for steps in (0, 1):
        fastrot.learn(uneven, text, ALL, scheme="w4a4", steps=steps, refine=1)
    assert seen == [1, 8]


@pytest.mark.parametrize(
    ("losses", "taken"),
    [((3, 2, 1), "second"), ((3, 2, 2.5), "first"), ((1, 3, 2), "none"), ((2, 3, 1), "second")],
)
def test_the_gate_takes_the_best(uneven, monkeypatch, losses, taken):
    """Of the recipe, the first matrices and the second; then no rotation is asked."""
    given = iter((*losses, 1.5))
    spread = torch.tensor([-0.01, 0.01], dtype=torch.float64)
    monkeypatch.setattr(
        learner, "_quantized_losses", lambda *_: Losses(next(given) + spread * next(noise))
    )
    noise = iter((1, 2, 3, 4))
    other = torch.eye(96, dtype=torch.float64)
    monkeypatch.setattr(learner, "refined", lambda *_: ({"R1": [other]}, [0.5]))
    text = random_ids(uneven, 16, 24, seed=3)
    learned = fastrot.learn(uneven, text, ("R1",), scheme="a4", steps=5, vectors=64, refine=1)
    assert learned.accepted == (taken != "none")
    assert learned.history[-1] == 0.5
    if learned.accepted:
        same = torch.equal(learned.matrices["R1"][0].matrix(), other)
        assert same == (taken == "second")
        assert learned.gain.mean == pytest.approx(min(losses[1:]) - losses[0], abs=0.02)
    assert learned.unrotated.mean == pytest.approx(min(losses) - 1.5, abs=0.02)
    assert learned.is_harmful == (taken == "first")


def test_refusals(uneven):
    text = random_ids(uneven, 16, 24, seed=3)
    for options, message in (
        ({"steps": -1}, "steps=-1"),
        ({"refine": 1.5}, "refine=1.5"),
        ({"steps": 0, "refine": 0}, "steps=0 and refine=0"),
        ({"vectors": 0}, "vectors=0"),
    ):
        with pytest.raises(fastrot.RotationError, match=message):
            fastrot.learn(uneven, text, ("R1",), **options)


@pytest.mark.parametrize(("scheme", "count"), [("w4a4kv4", 3), ("a4kv4", 2), ("w4gptq-a4", 2)])
def test_by_default_where_weights_are_rounded_to_nearest(uneven, monkeypatch, scheme, count):
    monkeypatch.setattr(learner, "REFINED", 1)
    text = random_ids(uneven, 16, 24, seed=3)
    learned = fastrot.learn(uneven, text, ("R1",), scheme=scheme, steps=2, vectors=64)
    assert len(learned.history) == count
