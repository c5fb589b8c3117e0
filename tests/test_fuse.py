"""Fusing rounds every weight once, and the journal takes everything back."""

import copy
import tracemalloc

import pytest
import torch
from helpers import tiny

import fastrot
from fastrot.fuse import Journal
from fastrot.rotation import KINDS


def dense(rotation, inverse):
    matrix = rotation.matrix()
    return matrix.T if inverse else matrix


def once_rounded(model, plan, edit):
    """The edit by dense float64 matrices, rounded to the storage dtype at the end."""
    from fastrot.edits import Scale

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
    expected = {edit.parameter: once_rounded(model, plan, edit) for edit in plan.edits}
    fastrot.apply(model, ("R1", "R2", "R4"), transform_type=kind)
    for name, (exact, rounded) in expected.items():
        got = model.get_parameter(name).detach()
        # Only a tie within float64's own error may fall to the other side.
        assert (got != rounded).float().mean() <= 2e-3, name
        error = (got.double() - exact).norm()
        assert error <= 1.001 * (rounded.double() - exact).norm() + 1e-12, name


@pytest.mark.parametrize("undo", ["memory", "disk", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_journal_restores_bit_for_bit(undo, dtype):
    weight = torch.randn(5, 7, dtype=torch.float64).to(dtype)
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt), Journal(weight.nbytes, undo) as journal:
        journal.save(weight)
        weight.zero_()
        raise KeyboardInterrupt
    assert torch.equal(weight, before)


def test_auto_takes_the_disk_when_memory_is_short(monkeypatch):
    monkeypatch.setattr("fastrot.fuse.journal.free_memory", lambda device: 1000)
    assert Journal(900).undo == "disk"
    assert Journal(700).undo == "memory"


def test_undo_on_disk_needs_no_second_model(monkeypatch):
    """Peak memory of the journal itself: nothing grows with the number of weights."""
    model = tiny("llama", hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512, layers=4)
    largest = max(p.numel() for p in model.parameters()) * 8
    copies = []
    from fastrot.fuse import journal

    monkeypatch.setattr(journal, "_copy", lambda data: copies.append(data))
    tracemalloc.start()
    fastrot.apply(model, ("R1", "R2"), undo="disk")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not copies
    assert peak < 4 * largest


def test_without_undo_an_error_says_that_the_weights_are_lost(monkeypatch):
    model = tiny("llama")
    config = model.config

    def fail(*args):
        raise MemoryError("injected")

    monkeypatch.setattr("fastrot.api.install", fail)
    with pytest.raises(RuntimeError, match="load the model anew") as caught:
        fastrot.apply(model, undo="none")
    assert isinstance(caught.value.__cause__, MemoryError)
    assert model.config is config


def test_an_interrupt_stays_one_without_undo(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrot.api.install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastrot.apply(tiny("llama"), undo="none")


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
