"""What the compilers make of the Triton kernels, on any machine: no spills, wide accesses.

Cases are compiled in a process of their own, since this one may interpret Triton.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

# Not importorskip: the process that compiles imports this file first, then settles how to compile.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

TARGETS = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
NAMES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
Report = dict[str, Any]


def compile_rows(n: int, source: str, target_dtype: str, signs: bool, arch: str) -> Report:
    from fastrot.hadamard import factors
    from fastrot.kernels import gpu_rows, gpu_tiles
    from fastrot.kernels.gpu_matrix import TABLE

    dtypes, backend = (NAMES[source], NAMES[target_dtype]), TARGETS[arch]
    tile = gpu_tiles.tile_for(*factors(n), *dtypes, backend)
    if tile is None:
        return {}
    constants = gpu_rows.rows_constants(tile, *dtypes, signs, signs, backend)
    part = "bf16" if source == "fp32" and backend != "cdna" else source
    types = {
        "x": f"*{source}",
        "out": f"*{target_dtype}",
        "signs": "*i8" if signs else f"*{source}",
        "left": f"*{part}" if constants["LEFT"] == TABLE.value else f"*{source}",
        "right": f"*{part}" if constants["RIGHT"] == TABLE.value else f"*{source}",
        "scale": "fp32",
        "vectors": "i32",
        "tiles": "i32",
    }
    resident = gpu_tiles.resident(tile, *dtypes, backend) if constants["PERSISTENT"] else 1
    report = _compile(gpu_rows._rows_kernel, types, constants, arch)
    return report | {"resident": resident}


def compile_axis(a: int, source: str, target_dtype: str, signs: bool, arch: str) -> Report:
    from fastrot.hadamard import factors
    from fastrot.kernels import gpu_axis

    factor = gpu_axis.Factor(*factors(a), a)
    backend = TARGETS[arch]
    constants = gpu_axis.axis_constants(factor, 4096, NAMES[source], signs, signs, backend)
    part = "bf16" if source == "fp32" and backend != "cdna" else source
    kernel = gpu_axis._axis64_kernel if source == "fp64" else gpu_axis._axis_kernel
    types = {
        "x": f"*{source}",
        "out": f"*{target_dtype}",
        "signs": "*i8" if signs else f"*{source}",
        "h": f"*{part}" if factor.bases else f"*{source}",
        "scale_bits" if source == "fp64" else "scale": "i64" if source == "fp64" else "fp32",
        "columns": "i32",
        "inner": "i32",
        "sign_stride": "i32",
        "sign_run": "i32",
    }
    return _compile(kernel, types, constants, arch) | {"resident": 1}


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: constants[k] for k in ("num_warps", "num_stages") if k in constants}
    values = {k: v for k, v in constants.items() if k not in options}
    names = kernel.arg_names
    aligned = [k for k, v in types.items() if v.startswith("*") or k == "inner"]
    source = ASTSource(
        fn=kernel,
        signature={k: types.get(k, "constexpr") for k in names},
        constexprs={(names.index(k),): v for k, v in values.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    hip = arch.startswith("gfx")
    gpu = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=gpu, options=options)
    report = _report_hip(compiled) if hip else _report_cuda(compiled)
    threads = options["num_warps"] * (64 if hip else 32)
    memory = {
        "shared": compiled.metadata.shared,
        "tensor": getattr(compiled.metadata, "tmem_size", 0),
    }
    return report | memory | {"threads": threads}


def _report_cuda(compiled: Any) -> Report:
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            command = (os.path.join(tools, command[0]), *command[1:], file.name)
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage"))
        code = re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", tool("nvdisasm", "-c"))
    assert usage
    spills = [i for i in code if i.startswith(("STL", "LDL"))]
    loads = [i for i in code if i.startswith(("LDG.", "LDGSTS."))]
    stores = [i for i in code if i.startswith("STG.")]
    return {
        "registers": int(usage[1]),
        "spills": int(usage[2]) + len(spills),
        "loads": len(loads),
        "stores": len(stores),
        "narrow": [i for i in loads + stores if "128" not in i],
    }


def _report_hip(compiled: Any) -> Report:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return max(int(v) for v in re.findall(rf"\.{name}:\s+(\d+)", code))

    loads = re.findall(r"\b(?:global|buffer)_load_\w+", code)
    stores = re.findall(r"\b(?:global|buffer)_store_\w+", code)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": len(loads),
        "stores": len(stores),
        # The result of a matrix core lies in runs of four.
        "narrow": [i for i in loads + stores if "dwordx2" not in i and "dwordx4" not in i],
    }


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _run(function: Callable[..., Report], case: str) -> Report:
    return function(*json.loads(case))


@pytest.fixture(scope="module")
def compiler() -> Iterator[Callable[..., Report]]:
    """Runs one of the two functions above in a process with Triton as it is on a GPU machine."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_no_interpreter) as pool:
        yield lambda function, *case: pool.submit(_run, function, json.dumps(case)).result()


def check_code(report: Report, arch: str, wide: bool = True) -> None:
    """No spills, the intended number of programs fits a multiprocessor, accesses are wide."""
    assert report["spills"] == 0
    assert report["shared"] <= SHARED_MEMORY[arch]
    assert (report["tensor"] or 0) <= 512
    resident = report["resident"]
    assert report["shared"] * resident <= SHARED_MEMORY[arch]
    # A multiprocessor has 65536 registers, a CDNA compute unit 4 x 64 lanes of 512.
    available = 131072 if arch.startswith("gfx") else 65536
    assert report["registers"] * report["threads"] * resident <= available
    assert report["loads"]
    assert report["stores"]
    if wide:
        assert not report["narrow"]


ROWS = [
    (64, "bf16", "bf16"),
    (4096, "bf16", "bf16"),
    (4096, "fp32", "fp32"),
    (14336, "bf16", "bf16"),
    (32768, "bf16", "bf16"),
]
SLOW_ROWS = [
    (256, "fp32", "fp32"),
    (768, "fp16", "fp16"),
    (8192, "bf16", "bf16"),
    (8192, "fp32", "fp32"),
    (172, "bf16", "bf16"),
    (2880, "bf16", "bf16"),
    (11008, "bf16", "bf16"),
    (11008, "fp32", "fp32"),
    (14336, "fp32", "fp32"),
    (16384, "bf16", "bf16"),
    (16384, "fp32", "bf16"),
    (32768, "fp32", "fp32"),
]


def check_rows(compiler: Callable[..., Report], case: tuple[int, str, str], arch: str) -> None:
    n, source, target = case
    report = compiler(compile_rows, n, source, target, False, arch)
    if not report:
        assert n == 32768
        pytest.skip("two passes")
    # Rows of 172 elements of 16 bits begin at multiples of 8 bytes.
    check_code(report, arch, wide=n % 8 == 0)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(compiler: Callable[..., Report], case: tuple[int, str, str], arch: str) -> None:
    check_rows(compiler, case, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", SLOW_ROWS, ids=str)
def test_more_rows(compiler: Callable[..., Report], case: tuple[int, str, str], arch: str) -> None:
    check_rows(compiler, case, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("n", [4096, 16384])
def test_rows_with_signs(compiler: Callable[..., Report], n: int, arch: str) -> None:
    """Signs are one byte each and cost registers, but nothing spills."""
    report = compiler(compile_rows, n, "bf16", "bf16", True, arch) | {"resident": 1}
    check_code(report, arch, wide=False)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("source", ["bf16", "fp32", "fp64"])
def test_axis(compiler: Callable[..., Report], source: str, arch: str) -> None:
    report = compiler(compile_axis, 64, source, source, False, arch)
    check_code(report, arch, wide=source != "fp64")


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    ("a", "source"),
    [(28, "fp32"), (128, "fp32"), (128, "bf16"), (172, "fp32"), (256, "bf16"), (284, "fp64")],
)
def test_more_axis(compiler: Callable[..., Report], a: int, source: str, arch: str) -> None:
    target = "fp64" if source == "fp64" else "fp32"
    check_code(compiler(compile_axis, a, source, target, False, arch), arch, wide=False)


def test_check_code_can_fail() -> None:
    good: Report = {"spills": 0, "shared": 1 << 16, "tensor": 512, "resident": 2, "registers": 128}
    good |= {"threads": 256, "loads": 1, "stores": 1, "narrow": []}
    check_code(good, "sm_80")
    bad: list[Report] = [
        {"spills": 1},
        {"shared": 164 << 10},
        {"tensor": 513},
        {"resident": 3},
        {"registers": 129},
        {"stores": 0},
        {"narrow": ["STG.E.64"]},
    ]
    for change in bad:
        with pytest.raises(AssertionError):
            check_code(good | change, "sm_80")
