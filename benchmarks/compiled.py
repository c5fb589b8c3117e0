"""The Triton kernels as the compilers leave them, on any machine: no GPU is needed.

A :class:`Launch` is one launch of a kernel as fastrot ships it, with what it moves and multiplies;
`launches.py` describes them all. :func:`compile_launch` compiles one and counts what a program
executes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from machine_code import Instruction, issued, multipliers, products, read, width

BACKENDS = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
"""The architectures, and which of fastrot's launch configurations they take."""


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

    name: str
    """For people, unique among the launches of an architecture."""
    kernel: Any
    types: dict[str, str]
    """Of pointers (``"*bf16"``) and floating-point scalars, by argument."""
    integers: dict[str, int]
    """Typical values: Triton compiles 1 and multiples of 16 apart."""
    constants: dict[str, Any]
    """Compile-time arguments and options."""
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
    aligned: bool = True
    """Vectors begin at multiples of 16 bytes."""
    signed: bool = False
    """Reads signs."""
    gathers: bool = False
    """Reads signs or tables, in accesses of any width."""
    scales: bool = False
    """Writes scales, in accesses of any width."""
    few: bool = False
    """Of few programs: what counts is how long one takes, not how much they issue or how widely."""

    @property
    def kernel_name(self) -> str:
        """Of the function, interpreted or not."""
        return str(self.kernel.fn.__name__)

    @property
    def ends(self) -> tuple[str, str]:
        """Types of what it reads and of what it writes."""
        first, last = ("x", "out") if "x" in self.types else ("q", "k_out")
        return self.types[first], self.types[last]

    @property
    def hip(self) -> bool:
        """For an AMD GPU."""
        return self.arch.startswith("gfx")


@dataclass(frozen=True)
class Compiled:
    """What became of a launch."""

    registers: int
    spills: int
    shared: int
    tensor: int
    """Columns of tensor memory."""
    threads: int
    loads: tuple[int, ...]
    """Bytes that a thread moves in each load from global memory."""
    stores: tuple[int, ...]
    unit: str
    """The instruction that multiplies."""
    per_tile: float
    """Instructions that a thread issues for one tile."""
    once: int
    """Instructions that a thread of a persistent program issues besides its tiles."""
    products: float
    """Made over needed; more than one if warps repeat each other's work."""


def compile_launch(launch: Launch) -> Compiled:
    """Compile for the architecture of the launch and count."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: launch.constants[k] for k in ("num_warps", "num_stages") if k in launch.constants}
    values = {k: v for k, v in launch.constants.items() if k not in options}
    values |= {k: 1 for k, v in launch.integers.items() if v == 1}
    types = launch.types | {k: "i32" for k, v in launch.integers.items() if v != 1}
    aligned = [k for k, v in launch.types.items() if v.startswith("*")]
    aligned += [k for k, v in launch.integers.items() if v % 16 == 0]
    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature={k: types.get(k, "constexpr") for k in names},
        constexprs={(names.index(k),): v for k, v in values.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    cuda = None if launch.hip else int(launch.arch[3:])
    target = GPUTarget("hip", launch.arch, 64) if cuda is None else GPUTarget("cuda", cuda, 32)
    binary = triton.compile(source, target=target, options=options)
    listing = read(binary, launch.hip)
    per_tile, once, made = count(listing.code, launch)
    names = multipliers(listing.code)
    units = [i.name for i in listing.code if i.name in names]
    return Compiled(
        registers=listing.registers,
        spills=listing.spills,
        shared=binary.metadata.shared,
        tensor=getattr(binary.metadata, "tmem_size", 0) or 0,
        threads=options["num_warps"] * target.warp_size,
        loads=tuple(width(name) for name in listing.loads),
        stores=tuple(width(name) for name in listing.stores),
        unit=units[0].split(".")[0] if units else "",
        per_tile=per_tile,
        once=once,
        products=made,
    )


def count(code: Sequence[Instruction], launch: Launch) -> tuple[float, int, float]:
    """Instructions of a thread per tile and per program besides; products over products needed.

    Machine code does not say how often a loop runs. The source does, compilers may peel iterations
    off, and the products that lie outside of the loop tell how many. Instructions behind a forward
    branch count as if all warps executed them.
    """
    warps = launch.constants["num_warps"]
    blackwell = any(i.name.startswith("UTCHMMA") for i in code)
    names = multipliers(code)

    def made(part: Sequence[Instruction]) -> int:
        if blackwell:  # the shape is in a register: count instructions
            return sum(i.name in names for i in part)
        return sum(products(i.name) for i in part if i.name in names)

    def need(dots: Sequence[Dot]) -> int:
        if blackwell:  # one takes 128 rows, 256 columns and a depth of 16
            return sum(-(-d.m // 128) * -(-d.k // 16) * d.count for d in dots)
        return sum(d.operations for d in dots) // warps

    needed, whole = need(launch.dots), made(code)
    loops = [(i.target, at + 1) for at, i in enumerate(code) if 0 <= i.target < at]
    inside, start, stop = max(
        ((made(code[start:stop]), start, stop) for start, stop in loops), default=(0, 0, 0)
    )
    if not inside:
        return issued(code), 0, whole / needed
    body = issued(code[start:stop])
    if launch.resident:
        return body, issued(code) - body, inside / needed
    peeled = whole - inside - need([d for d in launch.dots if not d.looped])
    # Where no warp repeats another's products, there is no doubt whether a loop is unrolled.
    unrolled = inside * launch.trips // needed if all(d.k == 1 for d in launch.dots) else 1
    trips = max(1, launch.trips // max(1, unrolled) - peeled // inside)
    return issued(code) + (trips - 1) * body, 0, (whole + (trips - 1) * inside) / needed
