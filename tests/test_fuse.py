"""Fusing rounds every weight once, and the journal takes everything back."""

import copy
import threading
import tracemalloc
from dataclasses import replace

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny

import fastrot
from fastrot import Rotation
from fastrot.edits import Rotate, Scale
from fastrot.fuse import Fusion
from fastrot.journal import Journal
from fastrot.rotations import KINDS


def dense(rotation, inverse):
    matrix = rotation.matrix()
    return matrix.T if inverse else matrix


def once_rounded(model, plan, edit):
    """The edit by dense float64 matrices, rounded to the storage dtype at the end."""
    stored = model.get_parameter(edit.parameter)
    weight = stored.detach().double()
    for step in edit.steps:
        if isinstance(step, Scale):
            weight = weight * (model.get_parameter(step.norm).detach().double() + step.offset)
        elif step.dim == weight.dim() - 1:
            weight = weight @ dense(step.rotation, step.inverse)
        else:
            weight = dense(step.rotation, step.inverse).T @ weight
    return weight, weight.to(stored.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_rounded_once(kind, dtype, tied):
    model = tiny("qwen2", dtype=dtype, tied=tied)
    plan = fastrot.plan(model, ("R1", "R2", "R4"), transform_type=kind)
    expected = {edit.parameter: once_rounded(model, plan, edit) for edit in plan.weights}
    fastrot.apply(model, ("R1", "R2", "R4"), transform_type=kind)
    for name, (exact, rounded) in expected.items():
        got = model.get_parameter(name).detach()
        # Only a tie within float64's own error may fall to the other side.
        assert (got != rounded).float().mean() <= 2e-3, name
        error = (got.double() - exact).norm()
        assert error <= 1.001 * (rounded.double() - exact).norm() + 1e-12, name


@pytest.mark.parametrize("undo", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_journal_restores_bit_for_bit(undo, dtype):
    weight = torch.randn(5, 7, dtype=torch.float64).to(dtype)
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt), Journal([weight], undo):
        weight.zero_()
        raise KeyboardInterrupt
    assert torch.equal(weight, before)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("undo", ["none", "disk", "memory"])
def test_memory_is_that_of_the_largest_weight(undo, tied):
    """No copies: nothing but the largest weight in float64, and the untied head."""
    sizes = {"hidden": 512, "intermediate": 1024, "vocab": 8192, "layers": 8}
    model = tiny("llama", tied=tied, heads=8, kv_heads=4, head_dim=64, **sizes)
    head = model.lm_head.weight.nbytes if tied else 0
    largest = max(p.numel() for p in model.parameters()) * 8
    everything = sum(p.nbytes for p in model.parameters())
    fastrot.apply(tiny("llama"), ("R1", "R2"))
    tracemalloc.start()
    fastrot.apply(model, ("R1", "R2"), undo=undo)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    overhead = 12 << 20  # panels in cache, and the list of all objects while looking for the whole
    assert (peak <= largest + head + overhead) == (undo != "memory")
    assert everything > largest + overhead


def test_two_threads_never_share_a_model(monkeypatch):
    model = tiny("llama")
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    inside, go_on = threading.Event(), threading.Event()
    run = Fusion.run

    def slow(*args):
        inside.set()
        go_on.wait(60)
        return run(*args)

    monkeypatch.setattr(Fusion, "run", slow)
    first = threading.Thread(target=fastrot.apply, args=(model, "R1"))
    first.start()
    inside.wait(60)
    with pytest.raises(fastrot.BusyModelError, match="another thread"):
        fastrot.apply(model, "R2")
    go_on.set()
    first.join()
    fastrot.apply(model, "R2")
    assert relative_error(logits(model, ids), expected) <= 1e-5


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_inside_a_device_context(device):
    model = tiny("llama")
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    with torch.device(device):
        fastrot.apply(model, ("R1", "R2", "R3", "R4"), transform_type="random-hadamard")
    assert relative_error(logits(model, ids), expected) <= 1e-5


def test_precision_float32_is_honoured():
    """Arithmetic in float32 differs from float64, by about float32's rounding."""
    model = tiny("llama", dtype=torch.float32)
    twin = copy.deepcopy(model)
    fastrot.apply(model, "R1")
    fastrot.apply(twin, "R1", precision=torch.float32)
    wide, narrow = (m.model.layers[0].mlp.up_proj.weight.detach().double() for m in (model, twin))
    difference = float((wide - narrow).norm() / wide.norm())
    assert 1e-9 < difference < 3e-7


def test_grad_flags_and_modes_stay():
    model = tiny("llama", tied=True).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    fastrot.apply(model, ("R1", "R2", "R3", "R4"))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
def test_steps_act_in_their_order(kind):
    """Diagonals before, between and behind rotations, on both sides: the dense product of all."""
    model = tiny("llama", dtype=torch.float64, intermediate=96)
    name, norms = "model.layers.0.mlp.down_proj.weight", "model.layers.{}.input_layernorm.weight"
    first, second = Rotation(kind, 96, seed=1), Rotation("random-hadamard", 96, 12, seed=2)
    steps = (
        Scale(1, norms.format(0), 0.0),
        Rotate(1, first, False, "R4"),
        Scale(0, norms.format(1), 0.5, inverse=True),
        Scale(1, norms.format(1), 1.0),
        Scale(1, norms.format(0), 0.0, inverse=True),
        Rotate(0, second, True, "R4"),
        Rotate(1, second, True, "R4"),
        Scale(1, norms.format(1), 0.0),
        Scale(0, norms.format(0), 2.0),
    )
    plan = fastrot.plan(model, "R4")
    edits = [replace(e, steps=steps) if e.parameter == name else e for e in plan.weights]
    before = model.get_parameter(name).detach().clone()
    gamma, delta = (model.get_parameter(norms.format(i)).detach().clone() for i in (0, 1))
    fastrot.apply(model, replace(plan, weights=tuple(edits)))
    right = gamma.diag() @ first.matrix() @ (delta + 1).diag() @ gamma.reciprocal().diag()
    right = right @ second.matrix().T @ delta.diag()
    left = (delta + 0.5).reciprocal().diag() @ second.matrix().T @ (gamma + 2).diag()
    torch.testing.assert_close(
        model.get_parameter(name).detach(), left.T @ before @ right, rtol=1e-13, atol=1e-13
    )
