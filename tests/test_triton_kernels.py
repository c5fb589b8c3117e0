"""The Triton kernels against dense float64 matrices: on a GPU if there is one, else interpreted."""

import os
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from oracles import halves, rms, transformed
from torch import Tensor

from fastrot.hadamard import base_matrix, factors

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU and Triton is not interpreted", allow_module_level=True)

from fastrot.kernels import gpu  # noqa: E402
from fastrot.kernels.gpu import _route, transform  # noqa: E402
from fastrot.kernels.gpu_few import cut_for  # noqa: E402
from fastrot.kernels.gpu_matrix import backend_of  # noqa: E402
from fastrot.kernels.gpu_tiles import TRITON_SHARES_ACCUMULATORS  # noqa: E402

SIZES = [1, 2, 12, 16, 28, 64, 96, 128, 768, 1024, 2880, 4096, 11008, 10944, 29568, 14336, 32768]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BUDGET = {torch.bfloat16: 1.1, torch.float16: 1.3}
"""Admissible RMS error, in errors of correct rounding."""
ULPS = 4
"""Admissible error of a vector in float32 and float64, in ulp of its norm."""


def exact(x: Tensor, signs: Tensor | None, scale: float, transpose: bool) -> Tensor:
    """Along the middle one of three dimensions, on the CPU."""
    return transformed(x.cpu(), x.shape[1], signs, scale=scale, transpose=transpose, dim=1)


def check_error(out: Tensor, truth: Tensor) -> None:
    """The error of ``out`` is within the budget of its dtype."""
    error = out.cpu().double() - truth
    assert error.isfinite().all()
    if error.numel() == 0:
        return
    if out.dtype in BUDGET:
        rounding = rms(truth.to(out.dtype).double() - truth)
        assert rms(error) <= BUDGET[out.dtype] * rounding
    else:
        ulp = torch.finfo(out.dtype).eps * truth.norm(dim=1)
        assert (error.norm(dim=1) <= ULPS * ulp).all()


def make(
    outer: int, n: int, inner: int, dtype: torch.dtype, signed: bool
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(outer * n + inner)
    x = torch.randn(outer, n, inner, dtype=torch.float64, generator=generator)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return x.to(DEVICE, dtype), signs.to(DEVICE, torch.int8) if signed else None


def check(
    outer: int, n: int, inner: int, dtype: torch.dtype, signed: bool, transpose: bool
) -> None:
    x, signs = make(outer, n, inner, dtype, signed)
    before = x.clone()
    scale = 1.1 * n**-0.5
    truth = exact(x, signs, scale, transpose)
    for few in (0, 1 << 20):  # by tiles of several vectors, and by many programs for each
        out = torch.full_like(x, float("nan"))
        with patch.object(gpu, "FEW", few):
            transform(x, out, signs, scale, transpose)
        assert torch.equal(x, before)
        check_error(out, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_rows(n: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and n > 4096 and INTERPRETED:
        pytest.skip("slow in the interpreter; smaller sizes take the same route")
    transpose = n % 3 == 0 or (n % 32 == 0 and dtype == torch.float16)
    check(1 if n > 8000 else 3, n, 1, dtype, signed=dtype != torch.float32, transpose=transpose)


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("n", [2, 12, 96, 768, 1024, 16384])
def test_signs_and_transpose(n: int, transpose: bool, signed: bool) -> None:
    check(1 if n > 8000 else 2, n, 1, torch.float16, signed, transpose)
    check(1, n, 1 if n > 8000 else 3, torch.float32, signed, transpose)


@pytest.mark.parametrize("outer", [0, 1, 3, 33])
@pytest.mark.parametrize("n", [1, 12, 64, 128, 768])
def test_partial_tiles(n: int, outer: int) -> None:
    check(outer, n, 1, torch.bfloat16, signed=True, transpose=True)
    check(outer, n, 1, torch.float32, signed=True, transpose=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("outer", "n", "inner"),
    [
        (1, 1, 80),
        (2, 2, 3),
        (3, 12, 80),
        (2, 28, 3),
        (1, 96, 80),
        (1, 768, 3),
        (1, 1024, 80),
        (1, 4096, 3),
        (1, 10944, 3),
    ],
)
def test_middle_dimension(outer: int, n: int, inner: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and n * inner > 20000 and INTERPRETED:
        pytest.skip("slow in the interpreter; smaller sizes take the same route")
    for transpose in (False, True) if n < 1000 else (n % 3 == 0,):
        check(outer, n, inner, dtype, True, transpose)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "inner"),
    [(12, 1), (64, 1), (768, 1), (4096, 1), (29568, 1), (32768, 1), (96, 5), (1024, 5)],
)
def test_in_place(n: int, inner: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and n > 1024 and INTERPRETED:
        pytest.skip("slow in the interpreter; smaller sizes take the same route")
    x, signs = make(1 if n > 4096 else 2, n, inner, dtype, True)
    out = torch.full_like(x, float("nan"))
    with patch.object(gpu, "FEW", 0):  # the other kernel reads what it has written
        transform(x, out, signs, n**-0.5, False)
    transform(x, x, signs, n**-0.5, False)
    assert torch.equal(x, out)


def test_more_vectors_than_a_launch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, signs = make(7, 64, 1, torch.float32, True)
    whole, parts = torch.empty_like(x), torch.full_like(x, float("nan"))
    monkeypatch.setattr(gpu, "FEW", 0)
    transform(x, whole, signs, 0.125, False)
    monkeypatch.setattr(gpu, "MOST", 3)
    transform(x, parts, signs, 0.125, False)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("transpose", [False, True])
def test_signs_in_a_pass_of_their_own_on_inference_tensors(transpose: bool) -> None:
    x, signs = make(2, 32768, 1, torch.float16, True)
    with torch.inference_mode():
        given, out = x.clone(), torch.full_like(x, float("nan"))
    with patch.object(gpu, "FEW", 0):
        transform(given, out, signs, 32768**-0.5, transpose)
    check_error(out, exact(x, signs, 32768**-0.5, transpose))


def test_round_trip() -> None:
    x, signs = make(2, 768, 1, torch.float64, True)
    y, z = torch.empty_like(x), torch.empty_like(x)
    transform(x, y, signs, 768**-0.5, False)
    transform(y, z, signs, 768**-0.5, True)
    assert (z - x).abs().max() < 1e-14
    assert (y - x).abs().max() > 1


@pytest.mark.parametrize("backend", ["ampere", "hopper", "blackwell", "cdna"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_powers_of_two_take_one_pass(dtype: torch.dtype, backend: str) -> None:
    # On Hopper two passes over 32768 float32 are faster than one, and more accurate.
    narrow = dtype == torch.float32 and backend in ("ampere", "hopper")
    if backend == "blackwell" and not TRITON_SHARES_ACCUMULATORS:
        narrow = True
    limit = 16384 if narrow else 32768
    for n in [2**k for k in range(17)]:
        route = _route((), n, True, dtype, backend)
        assert len(route.passes) == (n > limit)
        assert route.tile is not None, n


def test_every_route_covers_the_vector() -> None:
    """The factors of the passes, from left to right, are the factors of H_n."""
    for n in [*SIZES, 65536]:
        for rows in (False, True):
            for dtype in DTYPES:
                bases, power = factors(n)
                passes, tile = _route(bases, power, rows, dtype, "interpreter")
                atoms: list[int] = []
                for f in passes:
                    atoms += [*f.bases, *[2] * (f.power.bit_length() - 1)]
                if tile is not None:
                    atoms += [*tile.left_bases, *[2] * (tile.left_power.bit_length() - 1)]
                    atoms += [*tile.right_bases, *[2] * (tile.right_power.bit_length() - 1)]
                assert atoms == [*bases, *[2] * (power.bit_length() - 1)]


@pytest.mark.parametrize("backend", ["hopper", "ampere"])
def test_cuts_of_few_vectors(backend: str) -> None:
    sizes = [*(2**k for k in range(16)), 12, 768, 2880, 11008, 13824, 14336, 18944, 28672]
    for n in sizes:
        cut = cut_for(*factors(n), True, backend)
        assert cut is not None
        assert cut.a * cut.b == n
        parted = cut_for(*factors(n), False, backend)
        assert parted is None or n <= (2048 if backend == "ampere" else 16384)
        assert parted is not None or n > 2048
    assert cut_for(*factors(29568), True, backend) is None


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 4, 1, device="meta")
    with pytest.raises(RuntimeError, match=r"got a meta tensor.*use impl='cpu'"):
        transform(x, x, None, 1.0, False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"triton is not installed.*use impl='cpu'"):
        transform(x, x, None, 1.0, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_error_can_fail(dtype: torch.dtype) -> None:
    x, _ = make(3, 64, 1, torch.float64, False)
    truth = exact(x, None, 0.125, False)
    check_error(truth.to(dtype), truth)
    eps = torch.finfo(dtype).eps
    worse = truth + torch.where(torch.arange(64).view(1, 64, 1) % 2 == 0, 1.0, -1.0) * (
        eps * truth.norm(dim=1, keepdim=True)
    )
    for wrong in (worse, truth.flip(1), torch.full_like(truth, float("nan"))):
        with pytest.raises(AssertionError):
            check_error(wrong.to(dtype), truth)


def test_a_second_rounding_is_over_the_budget() -> None:
    x, _ = make(3, 4096, 1, torch.bfloat16, False)
    p, q = halves(4096)
    half = torch.einsum("oabi,ac->ocbi", x.cpu().double().reshape(3, len(p), len(q), 1), p)
    twice = torch.einsum("ocbi,bd->ocdi", half.bfloat16().double(), q).reshape(3, 4096, 1) / 64
    with pytest.raises(AssertionError):
        check_error(twice.bfloat16(), exact(x, None, 1 / 64, False))


def test_the_oracle_is_the_dense_matrix() -> None:
    x, signs = make(2, 24, 3, torch.float64, True)
    assert signs is not None
    assert factors(24) == ((12,), 2)
    dense = np.kron(base_matrix(12), base_matrix(2))
    h = torch.from_numpy(dense).double()
    d = signs.double().cpu()
    rows = x.cpu().transpose(1, 2)
    torch.testing.assert_close(exact(x, signs, 2.0, False), (2 * (rows * d) @ h).transpose(1, 2))
    torch.testing.assert_close(exact(x, signs, 2.0, True), (2 * rows @ h.T * d).transpose(1, 2))


def test_what_lies_between_passes_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding, of the result: a second one, of 16 bits in between, would make 1.41 of it."""
    n = 10944
    x, _ = make(1, n, 1, torch.float16, False)
    route = _route(*factors(n), True, torch.float16, backend_of(x.device))
    assert len(route.passes) + (route.tile is not None) > 1
    truth = exact(x, None, n**-0.5, False)
    rounding = rms(truth.half().double() - truth)

    def error() -> float:
        out = torch.empty_like(x)
        with patch.object(gpu, "FEW", 0):
            transform(x, out, None, n**-0.5, False)
        return rms(out.cpu().double() - truth) / rounding

    assert error() < 1.1
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None: empty(x))
    assert error() > 1.3
