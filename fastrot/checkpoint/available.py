"""Memory that a process may still take, as far as Linux says it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")

# Of versions 2 and 1: the limit of a group, what it uses, and what of that is cache to be dropped.
_UNIFIED = "memory.max", "memory.current", "inactive_file"
_SPLIT = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def available(root: Path = ROOT) -> int | None:
    """Bytes that the machine and the control groups of this process leave, None if unknown.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    found = [*_machine(root), *_groups(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    yield from _numbers(root / "proc/meminfo", "MemAvailable:", 1024)


def _groups(root: Path) -> Iterator[int]:
    """What each group leaves that this process is in, with all groups around it."""
    lines = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _SPLIT if controllers else _UNIFIED
        base = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                yield from _left(folder, *names)


def _left(folder: Path, most: str, used: str, cache: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no limit ("max"), or a group that a container hides
        left = int((folder / most).read_text()) - int((folder / used).read_text())
        yield left + sum(_numbers(folder / "memory.stat", cache))


def _numbers(file: Path, name: str, unit: int = 1) -> Iterator[int]:
    """The number behind a name in a file of such lines, in bytes."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.split()[:1] == [name]:
                yield int(line.split()[1]) * unit
