"""Rotations of weights in Triton: the properties of the CPU kernels, on a GPU or interpreted."""

import copy
import itertools
import os

import pytest
import torch
from test_cpu_kernels import (
    DTYPES,
    SHAPES,
    assert_one_rounding,
    assert_within_budget,
    generator,
    random_signs,
    rotated,
)
from zoo import FAMILIES, build

import fastrot
from fastrot.kernels import cpu_weight, gpu_weight
from fastrot.kernels.weight import Side, TwoSided, Workspace

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU and Triton is not interpreted", allow_module_level=True)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "lefts", "rights"),
    [
        ((48, 96), (None, 48, 4), (None, 96, 12)),
        ((40, 64), (None, 40, 20), (None, 64, 4)),
        *SHAPES[2:],
    ],
)
def test_rotate_matrix(shape, lefts, rights, compute, storage):
    rows, cols = shape
    for case, (m, n, scaled) in enumerate(itertools.product(lefts, rights, (False, True))):
        rng = generator(case, rows)
        whole = torch.randn(rows + 2, cols + 9, generator=rng, dtype=torch.float64).to(storage)
        gamma, row_gamma = (
            torch.rand(length, generator=rng) + 0.5 if scaled else None for length in (cols, rows)
        )
        left = Side(m, random_signs(m, rng) if case % 5 else None, case % 2 == 1) if m else None
        right = Side(n, random_signs(n, rng) if case % 7 else None, case % 4 > 1) if n else None
        w = whole[1:-1, :cols].double()
        exact = rotated(
            w if row_gamma is None else w * row_gamma.double()[:, None], left, right, gamma
        )
        whole = whole.to(DEVICE)
        w = whole[1:-1, :cols]
        out = w if case % 2 else torch.full_like(w, torch.nan)
        outside = whole.clone()
        gpu_weight.rotate_matrix(
            w, out, left=left, right=right, gamma=gamma, row_gamma=row_gamma, dtype=compute
        )
        assert_within_budget(out.cpu(), exact, compute)
        outside[1:-1, :cols] = whole[1:-1, :cols]
        assert torch.equal(outside, whole)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("left", "right"),
    [(None, 1024), (512, None), (64, 256), (512, 64), (344, 40), (None, 2880), (172, 12)],
)
def test_one_rounding(left, right, storage):
    """One pass and several, with tables and without, K that rides along, K of its own."""
    rng = generator(5)
    rows, cols = left or 3, right or 40
    w = torch.randn(rows, cols, generator=rng, dtype=torch.float64).to(storage)
    gamma = torch.rand(cols, generator=rng).to(storage)
    on_left = Side(left, random_signs(left, rng)) if left else None
    on_right = Side(right, random_signs(right, rng), True) if right else None
    exact = rotated(w, on_left, on_right, gamma)
    w = w.to(DEVICE)
    gpu_weight.rotate_matrix(w, w, left=on_left, right=on_right, gamma=gamma, dtype=torch.float64)
    assert_one_rounding(w.cpu(), exact)


@pytest.mark.parametrize("backend", ["ampere", "hopper", "blackwell", "cdna"])
def test_passes_make_up_the_sides(backend):
    for left, right in itertools.product((None, 12, 128, 4096, 14336), (None, 64, 172, 4096)):
        sides = (None if order is None else (order, False) for order in (left, right))
        steps = gpu_weight.passes(*sides, backend)
        orders = {True: 1, False: 1}
        for step in steps:
            orders[step.down] *= step.h.size
            if step.k is not None:
                orders[False] *= step.k.size
        assert orders == {True: left or 1, False: right or 1}


def test_powers_of_two_take_one_pass_along_rows_and_two_down():
    for size in (2, 64, 512, 4096, 16384):
        assert len(gpu_weight.passes(None, (size, False), "hopper")) == 1
        assert len(gpu_weight.passes((size, False), None, "hopper")) == (1 if size <= 256 else 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plans_take_the_kernel(name, monkeypatch):
    """What is written by the kernel is what the CPU's writes, but for rounding: every stage."""
    model = build(FAMILIES[name], torch.float32)
    expected = copy.deepcopy(model)
    rotations = {"rotations": ("R1", "R2", "R4"), "transform_type": "random-hadamard"}
    fastrot.apply(expected, **rotations)
    monkeypatch.setattr(cpu_weight, "MatrixRotation", gpu_weight.TritonRotation)
    rehearsed = []
    rehearse = gpu_weight.TritonRotation.rehearse
    monkeypatch.setattr(
        gpu_weight.TritonRotation, "rehearse", lambda *x: rehearsed.append(rehearse(*x))
    )
    model.to(DEVICE)
    fastrot.apply(model, **rotations)
    assert rehearsed
    for (key, want), got in zip(expected.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6, msg=key)


def test_rehearsing_writes_nothing():
    w = torch.randn(48, 96, device=DEVICE)
    out = torch.full_like(w, torch.nan)
    stages = [TwoSided(Side(48), Side(96)), TwoSided(Side(12), None)]
    rotation = gpu_weight.TritonRotation(w, out, stages, torch.float64)
    assert rotation.scratch == 48 * 96 * 8
    workspace = Workspace(rotation.scratch, rotation.panel, w.device)
    before = w.clone()
    rotation.rehearse(w, out, workspace)
    assert torch.equal(w, before)
    assert out.isnan().all()
    rotation.run(w, out, workspace)
    assert torch.equal(w, before)
    assert out.isfinite().all()


def test_what_it_takes():
    w = torch.empty(8, 8, device=DEVICE)
    if DEVICE == "cpu":
        assert not gpu_weight.takes(w, Side(8))
        assert not gpu_weight.takes(w.to("meta"), Side(8), None)
    else:
        assert not gpu_weight.takes(w.T, Side(8))
