"""What the compilers make of every launch that fastrot ships, on any machine.

The gates, and as data what cannot pass them, are in benchmarks/gates.py. Kernels are compiled in
processes of their own, since this one may interpret Triton.
"""

import ast
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

# A process that compiles imports this file first: before anything that imports Triton.
if multiprocessing.parent_process() is not None:
    os.environ.pop("TRITON_INTERPRET", None)

# Not importorskip, which would import it.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from compiled import BACKENDS, Compiled, Launch  # noqa: E402
from expected import EXPECTED, KNOWN, TRITON  # noqa: E402
from fused_launches import fused_launches, pass_launches, rope_launches  # noqa: E402
from gates import density, group, over_budget, violations  # noqa: E402
from gpus import GPUS, tightest  # noqa: E402
from launches import DTYPES, few_launch, transform  # noqa: E402
from shipped import configuration, shipped  # noqa: E402

FAST = [
    *((4096, dtype, -1, "") for dtype in ("bf16", "fp32")),
    *((14336, dtype, dim, "") for dtype in ("bf16", "fp32") for dim in (-1, 0)),
    *((32768, "bf16", -1, signs) for signs in ("", "signs", "transposed")),
    (64, "fp64", 0, ""),
]
"""Transforms whose launches every run of the tests compiles."""

Compiler = Callable[[str, Sequence[str]], dict[str, Compiled]]


@cache
def launches(arch: str) -> dict[str, Launch]:
    return {launch.name: launch for launch in shipped(arch)}


def fast(arch: str) -> list[str]:
    """The launches of :data:`FAST`, and the first of each other kernel."""
    made = [x for n, name, dim, signs in FAST for x in transform(n, DTYPES[name], dim, arch, signs)]
    names = {configuration(launch): name for name, launch in launches(arch).items()}
    made += filter(None, (few_launch(4096, torch.bfloat16, arch),))
    others = (next(f(arch)).name for f in (fused_launches, rope_launches, pass_launches))
    return list(dict.fromkeys((*(names[configuration(x)] for x in made), *others)))


def _compile(arch: str, name: str) -> Compiled:
    from compiled import compile_launch

    return compile_launch(launches(arch)[name])


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    """Compiles each launch once, with Triton as it is on a GPU machine."""
    made: dict[tuple[str, str], Compiled] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:

        def compiled(arch: str, names: Sequence[str]) -> dict[str, Compiled]:
            new = [name for name in names if (arch, name) not in made]
            for name, code in zip(new, pool.map(_compile, [arch] * len(new), new), strict=True):
                made[arch, name] = code
            return {name: made[arch, name] for name in names}

        yield compiled


def skip_other_versions() -> None:
    version = metadata.version("triton")
    if not version.startswith(TRITON):
        pytest.skip(f"the figures hold for Triton {TRITON}, this is {version}")


def check(compiler: Compiler, arch: str, names: Sequence[str]) -> None:
    skip_other_versions()
    found = {
        name: violations(launches(arch)[name], code) for name, code in compiler(arch, names).items()
    }
    known = {name: list(words) for name, words in KNOWN.get(arch, {}).items()}
    assert {name: words for name, words in found.items() if words} == {
        name: words for name, words in known.items() if name in names
    }


@pytest.mark.parametrize("arch", BACKENDS)
def test_representatives(compiler: Compiler, arch: str) -> None:
    names = fast(arch)
    assert {launches(arch)[name].kernel_name for name in names} == kernels()
    check(compiler, arch, names)


@pytest.mark.slow
@pytest.mark.parametrize("arch", BACKENDS)
def test_every_launch_on_one_architecture(compiler: Compiler, arch: str) -> None:
    """They take turns; the launches of two differ by few, if at all."""
    check(compiler, arch, list(launches(arch))[list(BACKENDS).index(arch) :: len(BACKENDS)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", BACKENDS)
def test_everything_shipped(compiler: Compiler, arch: str) -> None:
    check(compiler, arch, list(launches(arch)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", BACKENDS)
def test_expected_figures_are_needed_and_tight(compiler: Compiler, arch: str) -> None:
    skip_other_versions()
    codes = compiler(arch, list(launches(arch)))
    most: dict[Any, float] = {}
    for name, code in codes.items():
        launch = launches(arch)[name]
        if over_budget(launch, code):
            most[group(launch)] = max(most.get(group(launch), 0), density(launch, code))
    expected = {key: figures[arch] for key, figures in EXPECTED.items() if arch in figures}
    assert expected.keys() == most.keys()
    for key, figure in expected.items():
        assert most[key] <= figure <= 1.05 * most[key] + 0.1, key


def test_names_are_unique() -> None:
    for arch in BACKENDS:
        assert len(list(shipped(arch))) == len(launches(arch))


def test_known_are_shipped() -> None:
    for arch, known in KNOWN.items():
        assert known.keys() <= launches(arch).keys()


@pytest.mark.parametrize("arch", BACKENDS)
def test_every_configuration_is_shipped(arch: str) -> None:
    """Each entry of the tables that serve an architecture is reached.

    Hopper shares one with Blackwell, which has nothing tuned in its place.
    """
    from fastrot.kernels import gpu_axis, gpu_tiles

    arch = "sm_100" if arch == "sm_90" else arch
    backend = BACKENDS[arch]
    family = "hopper" if backend == "blackwell" else backend
    rows = {
        (bits, config)
        for (of, bits), t in gpu_tiles.CONFIGS.items()
        if of == family
        for config in t
    }
    axis = {(bits, size) for bits, table in gpu_axis.CONFIGS.items() for size in table}
    for launch in launches(arch).values():
        if launch.kernel_name not in ("_rows_kernel", "_axis_kernel", "_axis64_kernel"):
            continue
        c, ends = launch.constants, [DTYPES[end[1:]] for end in launch.ends]
        if launch.kernel_name == "_rows_kernel":
            config = gpu_tiles.config_for(c["A"], c["B"], *ends, backend)
            rows.discard((32 if DTYPES["fp32"] in ends else 16, config))
        else:
            axis.discard((8 * ends[0].itemsize, c["A"]))
    assert not rows
    assert not axis


def test_every_tuned_configuration_is_reached() -> None:
    from fastrot.hadamard import factors
    from fastrot.kernels.gpu_tiles import TUNED, tile_for

    sizes = [
        m << k for m in (1, 12, 20, 28, 44, 76, 148, 172, 212, 12 * 12, 12 * 28) for k in range(16)
    ]
    for (backend, bits), forms in TUNED.items():
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        tiles = [tile_for(*factors(n), dtype, dtype, backend) for n in sizes if 1 < n <= 1 << 15]
        assert set(filter(None, forms.values())) == {
            tile.config for tile in tiles if tile and tile.config in forms.values()
        }


def test_every_tuned_fused_configuration_is_reached() -> None:
    from itertools import product

    from fastrot.kernels.gpu_fused_launch import operands
    from fastrot.kernels.gpu_fused_tiles import TUNED, Cut, Prologue, fused_tile

    reached = set()
    sizes = [(n, n) for n in (4096, 5120, 8192, 11008, 14336)]
    sizes += [(4096, 16), (4096, 32), (4096, 128), (8192, 32), (14336, 16), (14336, 128)]
    for (n, block), before in product(sizes, (Prologue(), Prologue(eps=1e-6), Prologue("silu"))):
        exact = before.exact
        parts = operands(torch.bfloat16, exact, "hopper").parts
        tile = fused_tile(Cut(n, block, 0, parts, before, False, torch.bfloat16, "hopper"))
        assert tile is not None
        for form, config in TUNED.items():
            same = form[:3] == (tile.A, tile.B, tile.a > 1) and form.exact in (exact, None)
            reached |= {form} if same and tile.config == config else set()
    assert reached == TUNED.keys()


def kernels() -> set[str]:
    """Names of the Triton functions in fastrot/kernels that no other function calls."""
    made, called = set(), set()
    for path in (ROOT / "fastrot" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                    made.add(node.name)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
    return made - called


def test_no_kernel_without_gates() -> None:
    assert kernels() == {launch.kernel_name for launch in launches("sm_90").values()}


def test_budget() -> None:
    """132 multiprocessors at 1.98 GHz issue for 128 lanes; 4 bytes at 4.8 TB/s: 27.9."""
    h200 = tightest("sm_90")
    assert h200.name == "H200"
    assert h200.budget(4) == pytest.approx(132 * 1.98e9 * 128 / (4.8e12 / 4))
    assert {gpu.arch for gpu in GPUS} == set(BACKENDS)


def test_gates_can_fail() -> None:
    launch = next(x for x in shipped("sm_90") if x.resident and not x.gathers)
    good = Compiled(
        registers=65536 // 128 // launch.resident,
        spills=0,
        shared=(227 << 10) // launch.resident,
        tensor=0,
        threads=128,
        loads=(16, 16),
        stores=(16,),
        unit="HGMMA",
        per_tile=27 * launch.elements / 128,
        once=0,
        products=1.0,
    )
    assert violations(launch, good) == []
    bad: list[dict[str, Any]] = [
        {"spills": 1},
        {"registers": good.registers + 1},
        {"shared": good.shared + 1},
        {"tensor": 1},
        {"loads": (16, 8)},
        {"stores": (4,)},
        {"per_tile": 99 * launch.elements / 128},
        {"products": 0.9},
    ]
    for change in bad:
        assert len(violations(launch, replace(good, **change))) == 1, change
