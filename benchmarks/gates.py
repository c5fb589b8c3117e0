"""What a launch is held to without a GPU: :func:`violations` lists where it falls short.

Nothing spills, the intended programs fit a multiprocessor, global accesses have 16 bytes, and the
instructions of an element can be issued while memory moves its bytes
(:meth:`gpus.GPU.budget`). Launches that can't keep the last are held to figures in `expected.py`.
"""

from typing import NamedTuple

from compiled import Compiled, Launch
from expected import EXPECTED, Group
from gpus import per_element, tightest


class Multiprocessor(NamedTuple):
    """What all programs on a multiprocessor share."""

    registers: int
    shared: int
    """Bytes."""
    tensor: int
    """Columns of tensor memory."""

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """How many NVIDIA programs fit, from a thread's registers and a program's shared memory."""
        of_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        return min(self.shared // max(1, shared + 1024), of_registers, 64 // warps)


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 163 << 10, 0),
    "sm_90": Multiprocessor(65536, 227 << 10, 0),
    "sm_100": Multiprocessor(65536, 227 << 10, 512),
    "gfx942": Multiprocessor(131072, 64 << 10, 0),
}


def violations(launch: Launch, code: Compiled) -> list[str]:
    """Each gate that the launch does not pass, in words; `expected.KNOWN` has the shipped ones."""
    found = [*misfits(launch, code), *narrow(launch, code)]
    if code.spills:
        found.append(f"{code.spills} spills")
    if code.products < 1:
        found.append("not all products were counted")
    if slow := over_budget(launch, code):
        figure, expected = density(launch, code), EXPECTED.get(group(launch), {})
        if figure > expected.get(launch.arch, 0):
            found.append(f"{slow}, {figure:.1f} per element of the padded tile")
    return found


def misfits(launch: Launch, code: Compiled) -> list[str]:
    """Resources that the intended number of programs exhausts."""
    has, programs = MULTIPROCESSORS[launch.arch], max(1, launch.resident)
    needs = {
        "registers": (code.registers * code.threads * programs, has.registers),
        "bytes of shared memory": (code.shared * programs, has.shared),
        "columns of tensor memory": (code.tensor * programs, has.tensor),
    }
    return [f"{need} of {limit} {what}" for what, (need, limit) in needs.items() if need > limit]


def narrow(launch: Launch, code: Compiled) -> list[str]:
    """Accesses of fewer than 16 bytes, where vectors begin at multiples of 16 bytes.

    Tables and signs may be loaded in any width, so that among their loads one must be wide.
    """
    if not launch.aligned:
        return []
    loads, stores = min(code.loads), min(code.stores)
    if launch.gathers:
        loads = max(code.loads)
    if launch.scales:
        stores = max(code.stores)
    # CDNA's matrix units leave their result in runs of four.
    store = {"*i8": 4, "*u8": 4, "*bf16": 8, "*fp16": 8}.get(launch.ends[1], 16)
    store = store if launch.hip else 16
    # A row of a tile at a time: fewer elements than threads.
    if launch.kernel_name == "_axis64_kernel":
        return [f"loads of {loads} bytes"] * (loads < 8) + [f"stores of {stores}"] * (stores < 8)
    return [f"loads of {loads} bytes"] * (loads < 16) + [f"stores of {stores}"] * (stores < store)


def over_budget(launch: Launch, code: Compiled) -> str:
    """By how much issuing takes longer than moving, empty if it does not."""
    if launch.few:
        return ""
    gpu = tightest(launch.arch)
    figure, budget = per_element(launch, code, gpu), gpu.budget(launch.width)
    return f"{figure:.1f} instructions per element of {budget:.1f}" if figure > budget else ""


def tile(launch: Launch) -> tuple[int, int]:
    """Rows and columns of the padded tile, or of all that are counted as one."""
    c = launch.constants
    if launch.kernel_name == "_pass_kernel":
        return c["P"], c["Q"]
    return c["A"], c["B"] if "B" in c else c["COLUMNS"]


def density(launch: Launch, code: Compiled) -> float:
    """Instructions of threads per element of the padded tile."""
    rows, columns = tile(launch)
    figure = per_element(launch, code, tightest(launch.arch))
    return figure * launch.elements / (rows * columns)


def group(launch: Launch) -> Group:
    """Kernel, type that decides the arithmetic, and rows of the tile."""
    kernel = launch.kernel_name
    if kernel == "_pass_kernel":
        dtype = str(launch.constants["DTYPE"])
    elif kernel == "_rows_kernel":
        dtype = "fp32" if "*fp32" in launch.ends else "16 bit"
    else:
        dtype = {"*fp64": "fp64", "*fp32": "fp32"}.get(launch.ends[0], "16 bit")
    return kernel, dtype, tile(launch)[0]
