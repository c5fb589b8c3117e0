"""Machine code as text: what a thread issues, what it loads and stores, from SASS or AMDGCN."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    """An instruction; ``target`` is the position a branch goes to, -1 otherwise."""

    name: str
    target: int


class Listing(NamedTuple):
    """A kernel as its compiler leaves it."""

    code: list[Instruction]
    registers: int
    spills: int
    """Bytes of stack on CUDA, registers on AMD, and accesses to local memory."""
    loads: list[str]
    """Names of the instructions that load from global memory, for each how many bytes a thread."""
    stores: list[str]


def read(binary: Any, hip: bool) -> Listing:
    """The listing of a kernel that ``triton.compile`` has made."""
    if hip:
        return read_amdgcn(binary.asm["amdgcn"])
    return read_sass(*disassemble(binary.asm["cubin"]))


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


def read_sass(usage: str, listing: str) -> Listing:
    """What cuobjdump and nvdisasm print."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    code = linked(
        listing,
        label=r"(\.L_x_\d+):",
        line=r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)",
        jump=r"BRA.*?(\.L_x_\d+)",
        end="EXIT",
    )
    names = [i.name for i in code]
    return Listing(
        code,
        registers=int(found[1]),
        spills=int(found[2]) + sum(name.startswith(("STL", "LDL")) for name in names),
        loads=[name for name in names if name.startswith(("LDG.", "LDGSTS."))],
        stores=[name for name in names if name.startswith("STG.")],
    )


def read_amdgcn(text: str) -> Listing:
    """The assembler that LLVM prints for an AMD GPU."""

    def number(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

    code = linked(
        text,
        label=r"(\.LBB\d+_\d+):",
        line=r"\s+((?:[vs]|ds|global|buffer|flat|scratch)_\w+)(.*)",
        jump=r"s_c?branch\w*\s+(\.LBB\d+_\d+)",
        end="s_endpgm",
    )
    names = [i.name for i in code]
    return Listing(
        code,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        loads=[name for name in names if re.match(r"(global|buffer)_load_", name)],
        stores=[name for name in names if re.match(r"(global|buffer)_store_", name)],
    )


def linked(text: str, label: str, line: str, jump: str, end: str) -> list[Instruction]:
    """The kernel up to its last exit; behind it lie traps and the retries of waits.

    Args:
        text: the listing.
        label: matches the start of a line that is a label, and captures its name.
        line: matches the start of a line of code, and captures the instruction and its operands.
        jump: matches a branch with its operands, and captures the label it goes to.
        end: the instruction that ends a program.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for row in text.splitlines():
        if mark := re.match(label, row):
            labels[mark[1]] = len(found)
        elif code := re.search(line, row):
            aim = re.match(jump, code[1] + code[2])
            found.append((code[1], aim[1] if aim else ""))
    last = max(i for i, (name, _) in enumerate(found) if name == end)
    return [Instruction(name, labels.get(aim, -1)) for name, aim in found[: last + 1]]


def width(name: str) -> int:
    """Bytes that a thread moves in one global load or store."""
    if name.startswith(("LDG", "STG")):
        bits = re.search(r"\.(\d+|[US]8|[US]16)(?=\.|$)", name)
        return int(bits[1].lstrip("US")) // 8 if bits else 4
    dwords = re.search(r"dword(x(\d))?", name)
    if dwords:
        return 4 * int(dwords[2] or 1)
    return 1 if re.search(r"byte|_[ui]8", name) else 2


def products(name: str) -> int:
    """Products of a warp or wavefront in one instruction; 0 if the name doesn't tell."""
    if name.startswith("DMMA"):
        return 8 * 8 * 4
    if name.startswith("FFMA"):
        return 64 if name.startswith("FFMA2") else 32
    if name.startswith("HMMA.16816"):
        return 16 * 8 * 16
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # by four warps together
        return int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    if shape := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    if name.startswith(("DFMA", "DADD")):
        return 32
    return 64 if re.match(r"v_(fma|fmac|add)_f64", name) else 0


def multiplies(name: str) -> bool:
    """Whether it is one of the instructions that :func:`products` or their number counts."""
    return products(name) > 0 or name.startswith("UTCHMMA")


def multipliers(code: Sequence[Instruction]) -> set[str]:
    """Names of the instructions that multiply matrices: FFMA only where no other one does."""
    names = {i.name for i in code if multiplies(i.name)}
    return {name for name in names if not name.startswith("FFMA")} or names


def issued(code: Sequence[Instruction]) -> int:
    """Instructions that occupy the issue slots of the vector unit.

    An NVIDIA scheduler issues one of any kind per cycle. A CDNA one issues scalar, memory and
    vector instructions of different wavefronts side by side, so there the vector ones count.
    """
    amd = any(i.name.startswith(("v_", "s_")) for i in code)
    return sum(i.name.startswith("v_") for i in code) if amd else len(code)
