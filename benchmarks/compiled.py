"""The Triton kernels as the compilers leave them, on any machine: no GPU is needed.

A :class:`Launch` is one launch of a kernel as fastrot ships it, with what it moves and multiplies.
:func:`compile_launch` compiles it and counts what a program executes.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from fastrot.kernels.gpu_axis import Factor
    from fastrot.kernels.gpu_tiles import Tile

BACKENDS = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell"}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SHORT = {dtype: name for name, dtype in DTYPES.items()}


class Dot(NamedTuple):
    """``count`` products of an (m, k) with a (k, n) matrix."""

    m: int
    n: int
    k: int
    count: int
    looped: bool = True
    """In the loop inside a tile, if there is one."""

    @property
    def operations(self) -> int:
        """Multiplications, each with its addition."""
        return self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Launch:
    """One launch, ready to compile, and what a program does for one tile."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    arch: str
    elements: int
    """Of the tensor, in one tile; padding is no element."""
    width: int
    """Bytes read and written per element. Tables and signs stay in the caches."""
    dots: tuple[Dot, ...]
    trips: int
    """Of the loop inside a tile."""
    resident: int
    """Persistent programs on each multiprocessor, 0 for one program per tile."""


@dataclass(frozen=True)
class Compiled:
    """What became of a launch."""

    registers: int
    spills: int
    shared: int
    threads: int
    unit: str
    """The instruction that multiplies."""
    per_tile: float
    """Instructions that a thread issues for one tile."""
    once: int
    """Instructions that a thread of a persistent program issues besides its tiles."""
    products: float
    """Made over needed; more than one if warps repeat each other's work."""


def rows_launch(
    tile: "Tile", source: torch.dtype, target: torch.dtype, signs: bool, arch: str
) -> Launch:
    """A pass of :mod:`fastrot.kernels.gpu_rows`."""
    from fastrot.kernels import gpu_rows, gpu_tiles
    from fastrot.kernels.gpu_matrix import TABLE

    backend = BACKENDS[arch]
    c = gpu_rows.rows_constants(tile, source, target, signs, False, backend)
    x, part = SHORT[source], "bf16" if source == torch.float32 else SHORT[source]
    types = {
        "x": f"*{x}",
        "out": f"*{SHORT[target]}",
        "signs": "*i8" if signs else f"*{x}",
        "left": f"*{part}" if c["LEFT"] == TABLE.value else f"*{x}",
        "right": f"*{part}" if c["RIGHT"] == TABLE.value else f"*{x}",
        "scale": "fp32",
        "vectors": "i32",
        "tiles": "i32",
    }
    A, B, left, right = c["A"], c["B"], c["PARTS"] * bool(c["LEFT"]), c["MIDDLE_PARTS"]
    if c["BLOCK"] < B:
        trips = -(-c["COLUMNS"] // c["BLOCK"])
        dots = Dot(A, c["BLOCK"], A, left * trips), Dot(A, B, c["BLOCK"], right * trips)
    else:
        trips = -(-c["ROWS"] // c["CHUNK"])
        dots = Dot(A, B, c["CHUNK"], left * trips), Dot(A, B, B, right, trips == 1)
    resident = gpu_tiles.resident(tile, source, target, backend)
    width = source.itemsize + target.itemsize
    elements = c["ROWS"] * c["COLUMNS"]
    return Launch(gpu_rows._rows_kernel, types, c, arch, elements, width, dots, trips, resident)


def axis_launch(
    factor: "Factor", inner: int, source: torch.dtype, target: torch.dtype, signs: bool, arch: str
) -> Launch:
    """A pass of :mod:`fastrot.kernels.gpu_axis`."""
    from fastrot.kernels import gpu_axis

    c = gpu_axis.axis_constants(factor, inner, source, signs, False, BACKENDS[arch])
    wide = source == torch.float64
    x, part = SHORT[source], "bf16" if source == torch.float32 else SHORT[source]
    types = {
        "x": f"*{x}",
        "out": f"*{SHORT[target]}",
        "signs": "*i8" if signs else f"*{x}",
        "h": f"*{part}" if factor.bases else f"*{x}",
        "scale_bits" if wide else "scale": "i64" if wide else "fp32",
        "columns": "i32",
        "inner": "i32",
        "sign_stride": "i32",
        "sign_run": "i32",
    }
    if wide:
        trips, dot = c["SIZE"], Dot(c["A"], c["COLUMNS"], 1, c["SIZE"])
    else:
        trips = -(-c["SIZE"] // c["CHUNK"])
        dot = Dot(c["A"], c["COLUMNS"], c["CHUNK"], trips * c["PARTS"])
    kernel = gpu_axis._axis64_kernel if wide else gpu_axis._axis_kernel
    width = source.itemsize + target.itemsize
    elements = c["SIZE"] * c["COLUMNS"]
    return Launch(kernel, types, c, arch, elements, width, (dot,), trips, 0)


def compile_launch(launch: Launch) -> Compiled:
    """Compile for the architecture of the launch and count."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: launch.constants[k] for k in ("num_warps", "num_stages") if k in launch.constants}
    values = {k: v for k, v in launch.constants.items() if k not in options}
    names = launch.kernel.arg_names
    aligned = [k for k, v in launch.types.items() if v.startswith("*") or k == "inner"]
    source = ASTSource(
        fn=launch.kernel,
        signature={k: launch.types.get(k, "constexpr") for k in names},
        constexprs={(names.index(k),): v for k, v in values.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    target = GPUTarget("cuda", int(launch.arch[3:]), 32)
    binary = triton.compile(source, target=target, options=options)
    usage, listing = disassemble(binary.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    code = instructions(listing)
    spills = sum(i.name.startswith(("STL", "LDL")) for i in code)
    warps = options["num_warps"]
    per_tile, once, products = count(code, launch)
    units = [i.name for i in code if _operations(i.name) or i.name.startswith("UTCHMMA")]
    return Compiled(
        registers=int(found[1]),
        spills=int(found[2]) + spills,
        shared=binary.metadata.shared,
        threads=warps * 32,
        unit=units[0].split(".")[0] if units else "",
        per_tile=per_tile,
        once=once,
        products=products,
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS, by the tools in Triton's own package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        usage, listing = (
            subprocess.run([*c, file.name], check=True, capture_output=True, text=True).stdout
            for c in commands
        )
    return usage, listing


class Instruction(NamedTuple):
    """A SASS instruction; ``target`` is the position a branch goes to, -1 otherwise."""

    name: str
    target: int


def instructions(listing: str) -> list[Instruction]:
    """The kernel up to its exit; behind it lie traps and the retries of waits."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            aim = re.search(r"\.L_x_\d+", code[2])
            found.append((code[1], aim[0] if aim and code[1].startswith("BRA") else ""))
    exits = [i for i, (name, _) in enumerate(found) if name == "EXIT"]
    return [Instruction(name, labels.get(aim, -1)) for name, aim in found[: exits[-1] + 1]]


def _operations(name: str) -> int:
    """Products that a warp makes in one instruction; 0 if the name doesn't tell."""
    if name.startswith("HMMA.16816"):
        return 16 * 8 * 16
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # by four warps together
        return int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    return 32 if name.startswith(("DFMA", "DADD")) else 0


def count(code: Sequence[Instruction], launch: Launch) -> tuple[float, int, float]:
    """Instructions of a thread per tile and per program besides; products over products needed.

    SASS does not say how often a loop runs. The source does, compilers may peel iterations off, and
    the products that lie outside of the loop tell how many. Instructions behind a forward branch
    count as if all warps executed them.
    """
    warps = launch.constants["num_warps"]
    blackwell = any(i.name.startswith("UTCHMMA") for i in code)

    def products(part: Sequence[Instruction]) -> int:
        if blackwell:  # the shape is in a register: count instructions
            return sum(i.name.startswith("UTCHMMA") for i in part)
        return sum(_operations(i.name) for i in part)

    def need(dots: Sequence[Dot]) -> int:
        if blackwell:  # one takes 128 rows, 256 columns and a depth of 16
            return sum(-(-d.m // 128) * -(-d.k // 16) * d.count for d in dots)
        return sum(d.operations for d in dots) // warps

    needed, whole = need(launch.dots), products(code)
    loops = [(i.target, at + 1) for at, i in enumerate(code) if 0 <= i.target < at]
    inside, start, stop = max(
        ((products(code[start:stop]), start, stop) for start, stop in loops), default=(0, 0, 0)
    )
    if not inside:
        return len(code), 0, whole / needed
    body = stop - start
    if launch.resident:
        return body, len(code) - body, inside / needed
    peeled = whole - inside - need([d for d in launch.dots if not d.looped])
    trips = max(1, launch.trips - peeled // inside)
    return len(code) + (trips - 1) * body, 0, (whole + (trips - 1) * inside) / needed
