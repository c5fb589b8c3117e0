"""Two matrices side by side, such as queries and keys, in one pass over both."""

import pytest
import torch
from oracles import transformed
from test_cpu_kernels import DTYPES, assert_within_budget, random_signs

from fastrot.errors import RotationError
from fastrot.kernels import cpu
from fastrot.kernels.run import run_beside

SIZE, HEADS, KV_HEADS = 12, 5, 2


def slices(rows, dtype):
    """Queries and keys of one projection, with values behind them."""
    x = torch.randn(rows, (HEADS + 2 * KV_HEADS) * SIZE, dtype=dtype)
    return x.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], 1)[:2]


def backwards(rows, dtype):
    return slices(rows, dtype)[::-1]


def apart(rows, dtype):
    return tuple(part.clone() for part in slices(rows, dtype))


def near(rows, dtype):
    """As near as slices of a matrix are, but with rows of other lengths."""
    memory = torch.randn(rows * 7 * SIZE + 2 * SIZE, dtype=dtype)
    query = memory.as_strided((rows, 2 * SIZE), (7 * SIZE, 1))
    return query, memory[2 * SIZE :].as_strided((rows, SIZE), (5 * SIZE, 1))


def across(rows, dtype):
    """No unit stride, which only copies have."""
    return tuple(part.t().contiguous().t() for part in slices(rows, dtype))


@pytest.mark.parametrize("made", [slices, backwards, apart, near, across])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 3000])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_as_each_alone(made, dtype, rows, signed, transpose):
    a, b = made(rows, dtype)
    signs = random_signs(SIZE, torch.Generator().manual_seed(0)).to(torch.int8) if signed else None
    before = a.clone(), b.clone()
    out = run_beside(a, b, signs, 0.3, SIZE, transpose)
    exact = [transformed(x, SIZE, signs, scale=0.3, transpose=transpose) for x in (a, b)]
    assert_within_budget(out, torch.cat(exact, 1))
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(("made", "passes"), [(slices, 1), (apart, 2), (near, 2)])
def test_slices_of_one_matrix_take_one_pass(made, passes, monkeypatch):
    seen = []
    sweep = cpu._sweep
    monkeypatch.setattr(cpu, "_sweep", lambda *args: (seen.append(args), sweep(*args)))
    run_beside(*made(3, torch.float32), None, 1.0, SIZE, False)
    assert len(seen) == passes


def test_without_rows():
    a, b = slices(0, torch.float32)
    assert run_beside(a, b, None, 1.0, SIZE, False).shape == (0, (HEADS + KV_HEADS) * SIZE)


@pytest.mark.parametrize(
    ("size", "signs", "problem"),
    [
        (16, None, "does not divide"),
        (SIZE, torch.ones(SIZE + 1), "signs has shape"),
        (SIZE, torch.full((SIZE,), 2), "not ±1"),
    ],
)
def test_refusals(size, signs, problem):
    a, b = slices(3, torch.float32)
    with pytest.raises(RotationError, match=problem):
        run_beside(a, b, signs, 1.0, size, False)


def test_blocks_lie_in_queries_or_in_keys():
    whole = torch.randn(3, 3 * SIZE)
    a, b = whole.split((SIZE * 3 // 2, SIZE * 3 // 2), 1)
    with pytest.raises(RotationError, match="does not divide"):
        run_beside(a, b, None, 1.0, SIZE, False)
    assert run_beside(whole, whole[:, :0], None, 1.0, SIZE, False).shape == whole.shape
