"""The CPU kernels against dense float64 products: sizes, layouts, dtypes, rounding, threads."""

import _thread
import itertools
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import correctly_rounded, rms, transformed
from torch import Tensor

from fastrot.kernels import _cpu_threads, cpu
from fastrot.kernels.cpu import transform
from fastrot.kernels.cpu_weight import rotate_matrix
from fastrot.kernels.weight import Side

SIZES = (1, 2, 4, 8, 12, 16, 20, 28, 36, 64, 76, 80, 128, 172, 256, 576, 768, 1024, 2880)
LARGE = (8192, 10944, 11008, 14336, 16384, 65536)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def random_signs(size: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=rng).double() * 2 - 1


def expected(x: Tensor, signs: Tensor | None, scale: float, transpose: bool) -> Tensor:
    """Along the middle one of three dimensions."""
    return transformed(x, x.shape[1], signs, scale=scale, transpose=transpose, dim=1)


def actual(x: Tensor, signs: Tensor | None, scale: float, transpose: bool) -> Tensor:
    out = torch.full_like(x, torch.nan)
    transform(x, out, signs, scale, transpose)
    return out


def assert_within_budget(out: Tensor, exact: Tensor, compute: torch.dtype | None = None) -> None:
    """The error may be little above that of the one rounding and of sums in ``compute``."""
    compute = compute or (torch.float64 if out.dtype == torch.float64 else torch.float32)
    assert not out.isnan().any()
    rounding = rms(correctly_rounded(exact, out.dtype).double() - exact)
    factor = {torch.bfloat16: 1.1, torch.float16: 1.3}.get(out.dtype, 1.0)
    ulps = 4 if torch.float64 in (compute, out.dtype) or compute == out.dtype else 0
    limit = factor * rounding + ulps * torch.finfo(compute).eps * rms(exact)
    error = rms(out.double() - exact)
    assert error <= limit, f"error {error:.3e} over the budget of {limit:.3e}"


def assert_one_rounding(out: Tensor, exact: Tensor) -> None:
    """All but one in a thousand correctly rounded, the rest to a neighbour."""
    target = correctly_rounded(exact, out.dtype)
    wrong = out != target
    assert wrong.double().mean() <= 1e-3
    integer = torch.int16 if out.element_size() == 2 else torch.int32
    assert ((out.view(integer).long() - target.view(integer).long())[wrong].abs() <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_transform(n, dtype):
    for outer, inner, signed, transpose in itertools.product((1, 7), (1, 3), (0, 1), (0, 1)):
        rng = generator(n, outer, inner, signed, transpose)
        x = torch.randn(outer, n, inner, generator=rng, dtype=torch.float64).to(dtype)
        signs = random_signs(n, rng) if signed else None
        scale = n**-0.5
        exact = expected(x, signs, scale, bool(transpose))
        assert_within_budget(actual(x, signs, scale, bool(transpose)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LARGE)
def test_transform_of_large_sizes(n, dtype):
    for (outer, inner), transpose in itertools.product(((2, 1), (1, 5)), (False, True)):
        rng = generator(n, outer, inner, transpose)
        x = torch.randn(outer, n, inner, generator=rng, dtype=torch.float64).to(dtype)
        signs = random_signs(n, rng)
        exact = expected(x, signs, n**-0.5, transpose)
        assert_within_budget(actual(x, signs, n**-0.5, transpose), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "inner"), [(64, 1), (36, 1), (768, 1), (64, 40), (768, 129)])
def test_threads(n, inner, dtype, threads):
    rng = generator(n, inner)
    x = torch.randn(400_000 // (n * inner), n, inner, generator=rng, dtype=torch.float64).to(dtype)
    signs = random_signs(n, rng)
    exact = expected(x, signs, n**-0.5, False)
    assert_within_budget(actual(x, signs, n**-0.5, False), exact)


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from(SIZES),
    outer=st.integers(0, 40),
    inner=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    signed=st.booleans(),
    transpose=st.booleans(),
    seed=st.integers(0, 999),
)
def test_integers_are_exact(n, outer, inner, dtype, signed, transpose, seed):
    """Sums of small integers are exact wherever they are representable."""
    most = {torch.bfloat16: 256, torch.float16: 2048}.get(dtype, 2**20)
    rng = generator(seed)
    x = torch.randint(-3, 4, (outer, n, inner), generator=rng).double()
    signs = random_signs(n, rng) if signed else None
    exact = expected(x, signs, 1.0, transpose)
    out = actual(x.to(dtype), signs, 1.0, transpose).double()
    fits = exact.abs() <= most
    assert torch.equal(out[fits], exact[fits])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [12, 64, 172, 768])
def test_transpose_is_the_inverse(n, dtype):
    rng = generator(n)
    for shape in ((5, n, 1), (2, n, 17)):
        x = torch.randint(-3, 4, shape, generator=rng).to(dtype)
        signs = random_signs(n, rng)
        there = actual(x.double(), signs, 1.0, False)
        back = actual(there, signs, 1 / n, True)
        torch.testing.assert_close(back, x.double(), rtol=0, atol=1e-12)
        mixed = actual(actual(x, signs, n**-0.5, False), signs, n**-0.5, True)
        assert rms(mixed.double() - x.double()) <= 3 * torch.finfo(dtype).eps * rms(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 24])
def test_in_place(dtype, inner):
    x = torch.randn(30, 256, inner, generator=generator(1)).to(dtype)
    separate = actual(x, None, 1 / 16, False)
    transform(x, x, None, 1 / 16, False)
    assert torch.equal(x, separate)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_number_survives(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(-1, 1, 1)
    out = actual(x, None, 1.0, False)
    number = ~x.isnan()
    assert torch.equal(out.view(torch.int16)[number], x.view(torch.int16)[number])
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_rounding_is_to_nearest_even(dtype, compute):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    w = bits.view(dtype)[bits.view(dtype).isfinite()].view(-1, 64)
    rng = generator(3)
    for gamma in (
        torch.rand(64, generator=rng, dtype=torch.float64) * 2,
        1 + torch.randint(0, 9, (64,), generator=rng).double() * torch.finfo(dtype).eps / 4,
    ):
        exact = w.double() * gamma.to(compute).double()
        out = torch.full_like(w, torch.nan)
        rotate_matrix(w, out, left=None, right=None, gamma=gamma, dtype=compute)
        if compute == torch.float32:
            exact = exact.float().double()
        fits = (exact.abs() <= torch.finfo(dtype).max) & (exact.abs() >= 2.0**-126)
        assert torch.equal(out[fits], correctly_rounded(exact, dtype)[fits])
        beyond = exact.abs() >= torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps)
        assert out[beyond].isinf().all()


def test_ties_between_float32_and_bfloat16_are_rounded_once():
    halfway = 1 + 2.0**-8
    w = torch.tensor([[halfway + 2.0**-40, halfway, halfway - 2.0**-40]], dtype=torch.float64)
    gamma, ones = w[0].clone(), torch.ones(1, 3, dtype=torch.bfloat16)
    out = torch.empty_like(ones)
    rotate_matrix(ones, out, left=None, right=None, gamma=gamma, dtype=torch.float64)
    assert out.tolist() == [[1 + 2.0**-7, 1.0, 1.0]]


def rotated(w: Tensor, left: Side | None, right: Side | None, gamma: Tensor | None) -> Tensor:
    y = w.double() if gamma is None else w.double() * gamma.double()
    rows, cols = w.shape
    if right:
        x = y.reshape(-1, right.size, 1)
        y = expected(x, right.signs, right.size**-0.5, right.transpose).view(rows, cols)
    if left:
        x = y.reshape(-1, left.size, cols)
        y = expected(x, left.signs, left.size**-0.5, left.transpose).view(rows, cols)
    return y


SHAPES = (
    ((128, 96), (None, 128, 64, 4), (None, 96, 12, 48)),
    ((80, 256), (None, 80, 16, 20), (None, 256, 64, 4)),
    ((24, 1), (None, 24, 2), (None, 1)),
    ((1, 76), (None, 1), (None, 76, 2)),
)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "lefts", "rights"), SHAPES)
def test_rotate_matrix(shape, lefts, rights, compute, storage):
    rows, cols = shape
    for case, (m, n, scaled) in enumerate(itertools.product(lefts, rights, (False, True))):
        rng = generator(case, rows)
        whole = torch.randn(rows + 2, cols + 9, generator=rng, dtype=torch.float64).to(storage)
        w = whole[1:-1, :cols] if case % 3 else whole[1:-1, :cols].contiguous()
        gamma = torch.rand(cols, generator=rng) + 0.5 if scaled else None
        left = Side(m, random_signs(m, rng) if case % 5 else None, case % 2 == 1) if m else None
        right = Side(n, random_signs(n, rng) if case % 7 else None, case % 4 > 1) if n else None
        exact = rotated(w, left, right, gamma)
        out = w if case % 2 else torch.full_like(w, torch.nan)
        outside = whole.clone()
        rotate_matrix(w, out, left=left, right=right, gamma=gamma, dtype=compute)
        assert_within_budget(out, exact, compute)
        outside[1:-1, :cols] = whole[1:-1, :cols]
        assert torch.equal(outside, whole)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("left", "right"), [(None, 1024), (1024, None), (64, 1024), (512, 2880)])
def test_one_rounding(left, right, storage, threads):
    rng = generator(5)
    rows, cols = left or 192, right or 320
    w = torch.randn(rows, cols, generator=rng, dtype=torch.float64).to(storage)
    gamma = torch.rand(cols, generator=rng).to(storage)
    on_left = Side(left, random_signs(left, rng)) if left else None
    on_right = Side(right, random_signs(right, rng), True) if right else None
    exact = rotated(w, on_left, on_right, gamma)
    rotate_matrix(w, w, left=on_left, right=on_right, gamma=gamma, dtype=torch.float64)
    assert_one_rounding(w, exact)


def test_both_sides_wide():
    """Wider than any panel: the intermediate goes through a scratch matrix."""
    rng = generator(6)
    w = torch.randn(512, 2048, generator=rng)
    left, right = Side(512, random_signs(512, rng)), Side(2048, random_signs(2048, rng), True)
    exact = rotated(w, left, right, None)
    rotate_matrix(w, w, left=left, right=right, gamma=None, dtype=torch.float64)
    assert_one_rounding(w, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("left", "right"), [(None, 16), (12, None), (12, 16), (4, 80)])
def test_nan_stays_in_its_block(left, right, value):
    rows, cols = 36, 160
    for storage in DTYPES:
        w = torch.ones(rows, cols).to(storage)
        w[13, 101] = value
        on_left, on_right = (Side(size) if size else None for size in (left, right))
        rotate_matrix(w, w, left=on_left, right=on_right, gamma=None, dtype=torch.float64)
        m, n = left or 1, right or 1
        hit = torch.zeros(rows, cols, dtype=torch.bool)
        hit[13 // m * m : 13 // m * m + m, 101 // n * n : 101 // n * n + n] = True
        assert torch.equal(~w.isfinite(), hit)


@pytest.mark.skipif(sys.platform != "linux", reason="the question is one of Linux's madvise")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_memory_that_cannot_be_written_is_refused(tmp_path):
    """A kernel could only crash there; a private copy of a file's pages takes the result."""
    data = np.arange(6 * 1024, dtype=np.float32)
    path = tmp_path / "weights"
    data.tofile(path)
    with path.open("rb") as file:
        maps = [mmap.mmap(file.fileno(), 0, access=a) for a in (mmap.ACCESS_READ, mmap.ACCESS_COPY)]
    read_only, private = (torch.frombuffer(m, dtype=torch.float32).view(6, 1024) for m in maps)
    with pytest.raises(ValueError, match=r"shape \(6, 1024\): it lies in read-only memory"):
        rotate_matrix(
            read_only, read_only, left=None, right=Side(64), gamma=None, dtype=torch.float64
        )
    view = read_only.view(6, 1024, 1)
    with pytest.raises(ValueError, match="rotate a copy"):
        transform(view, view, None, 1.0, False)
    out = torch.empty_like(read_only)
    rotate_matrix(read_only, out, left=None, right=Side(64), gamma=None, dtype=torch.float64)
    rotate_matrix(private, private, left=None, right=Side(64), gamma=None, dtype=torch.float64)
    assert torch.equal(out, private)
    assert np.array_equal(np.fromfile(path, np.float32), data)


@pytest.mark.parametrize("shape", [(0, 8, 1), (3, 8, 0), (0, 12, 5)])
def test_nothing_to_do(shape):
    x = torch.empty(shape)
    transform(x, torch.empty_like(x), None, 1.0, False)


def test_two_callers_at_once(threads):
    rng = generator(7)
    inputs = [torch.randn(500, 768, 1, generator=rng, dtype=torch.float64) for _ in range(2)]
    exact = [expected(x, None, 768**-0.5, False) for x in inputs]
    errors: list[Exception] = []

    def call(index: int) -> None:
        try:
            for _ in range(10):
                out = actual(inputs[index], None, 768**-0.5, False)
                assert_within_budget(out, exact[index])
        except Exception as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors


def _forked(queue, x, scale):
    out = actual(x, None, scale, False)
    queue.put(out.numpy().tobytes())


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="the platform cannot fork"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_too():
    x = torch.randn(300, 1024, 1, generator=generator(8))
    here = actual(x, None, 1 / 32, False)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(queue, x, 1 / 32))
    child.start()
    there = queue.get(timeout=50)
    child.join()
    assert there == here.numpy().tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who was forked")
def test_a_child_of_a_process_whose_threads_worked_before():
    """The runtime of OpenMP would wait for threads that only the parent has."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
x = torch.ones(300, 1024).exp().log_()
child = os.fork()
if child == 0:
    signal.alarm(40)
    import fastrot
    os._exit(int(fastrot.hadamard_transform(x)[0, 0] < 1000))
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_budget_can_be_exceeded(dtype):
    exact = torch.randn(64, 64, generator=generator(9), dtype=torch.float64)
    good = exact.to(dtype)
    assert_within_budget(good, exact)
    scaled = good.double() * (1 + 8 * torch.finfo(dtype).eps)
    truncated = (exact - exact.abs() * 8 * torch.finfo(dtype).eps).to(dtype)
    for bad in (scaled.to(dtype), truncated, good.roll(1), good * torch.nan):
        with pytest.raises(AssertionError):
            assert_within_budget(bad, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_second_rounding_is_noticed(dtype):
    exact = torch.randn(64, 64, generator=generator(10), dtype=torch.float64)
    assert_one_rounding(correctly_rounded(exact, dtype), exact)
    with pytest.raises(AssertionError):
        assert_one_rounding(((exact * 3).to(dtype).double() / 3).to(dtype), exact)


@pytest.mark.parametrize("n", [256, 2048, 8192])
def test_exact_sums_are_rounded_once(n):
    rng = generator(n)
    x = torch.randint(-3, 4, (5, n, 1), generator=rng).float()
    sums, scale = actual(x, None, 1.0, False), n**-0.5
    assert torch.equal(sums.double(), expected(x, None, 1.0, False).round())
    assert torch.equal(actual(x, None, scale, False), sums * scale)


@pytest.fixture
def without_openmp(monkeypatch):
    monkeypatch.setattr(_cpu_threads, "_openmp", lambda process: None)


def test_threads_that_stay_and_threads_that_end(threads, request):
    x = torch.randn(400, 1024, 1, generator=generator(9))
    exact = actual(x, None, 1 / 32, False)
    request.getfixturevalue("without_openmp")
    assert torch.equal(actual(x, None, 1 / 32, False), exact)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch was built without")
def test_the_threads_of_torch_are_found():
    assert _cpu_threads._openmp(os.getpid()) is not None


def _native_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by Linux")
def test_threads_of_torch_stay():
    """OpenMP would end those that have no place in a smaller team."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.ones(1 << 20).exp_()
    there = _native_threads()
    x = torch.randn(200, 1024, 1, generator=generator(11))  # two tasks
    actual(x, None, 1 / 32, False)
    assert _native_threads() == there
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [16384, 14336])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_first_dimension_in_two_passes(n, transpose, dtype, threads, monkeypatch):
    monkeypatch.setattr(cpu, "LONG_BYTES", 1 << 16)
    rng = generator(n)
    x = torch.randn(2, n, 5, generator=rng, dtype=dtype)
    cpu._plan.cache_clear()
    assert len(cpu._plan(x.shape, n, 1, transpose, dtype)) == 2
    signs = random_signs(n, rng)
    exact = expected(x, signs, n**-0.5, transpose)
    assert_within_budget(actual(x, signs, n**-0.5, transpose), exact)
    transform(x, x, signs, n**-0.5, transpose)
    assert_within_budget(x, exact)
    cpu._plan.cache_clear()


def test_memory_for_two_passes_is_asked_for_before_the_first(monkeypatch):
    """In place there would be no way back."""
    monkeypatch.setattr(cpu, "LONG_BYTES", 1 << 16)
    cpu._plan.cache_clear()
    x = torch.randn(1, 16384, 5, generator=generator(12))
    assert len(cpu._plan(x.shape, 16384, 1, False, x.dtype)) == 2
    before = x.clone()
    for granted in range(2):
        left = iter(range(granted))

        def scarce(*arguments, left=left, empty=np.empty):
            if next(left, None) is None:
                raise MemoryError
            return empty(*arguments)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(np, "empty", scarce)
            transform(x, x, None, 1 / 128, False)
        assert torch.equal(x, before)
    cpu._plan.cache_clear()


def test_the_default_device_is_for_others():
    code = """
import torch
from fastrot.kernels.run import run_beside
x = torch.ones(4, 8)
with torch.device("meta"):
    assert (run_beside(x, x, None, 1.0, 8, False)[:, ::8] == 8).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.usefixtures("without_openmp")
def test_a_machine_without_more_threads(error, threads, monkeypatch):
    def none(*_):
        raise error

    x = torch.randn(400, 1024, 1, generator=generator(9))
    exact = actual(x, None, 1 / 32, False)
    monkeypatch.setattr(_thread, "start_new_thread", none)
    assert torch.equal(actual(x, None, 1 / 32, False), exact)


@pytest.mark.slow
def test_a_machine_that_numba_takes_for_a_simpler_one(tmp_path):
    """What Numba compiles for decides about vectors and conversions, not what the machine has."""
    code = """
import torch, fastrot
x = torch.randint(-2048, 2049, (3, 256)).half()  # sums exact in float32: rounded once, as there
exact = fastrot.hadamard_transform(x, 1 / 16, impl="reference")
assert torch.equal(fastrot.hadamard_transform(x, 1 / 16), exact)
"""
    simple = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **simple}, check=True)
