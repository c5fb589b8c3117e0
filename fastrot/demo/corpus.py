"""Text for the demo model: the source of Python's own standard library, as bytes."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEPARATOR = 0
"""The byte put before every file; it occurs in no source file."""

HELDOUT = (
    "argparse.py",
    "calendar.py",
    "cmd.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "fractions.py",
    "heapq.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "textwrap.py",
)
"""Modules of every CPython from 3.10 on that no training run reads, about 370 kB together."""

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_GENERATED = ("_sysconfigdata*.py", "config-*/*.py", "html/entities.py", "stringprep.py")


def stdlib_root() -> Path:
    """Return the folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def training_files(root: Path | None = None) -> list[Path]:
    """List the library's hand-written modules, sorted by path, without the held-out ones.

    Args:
        root: The library's folder; the running interpreter's by default.
    """
    root = root or stdlib_root()
    return [path for path in sorted(root.rglob("*.py")) if _is_training(path, root)]


def heldout_files(root: Path | None = None) -> list[Path]:
    """List the held-out modules in the order of `HELDOUT`.

    Args:
        root: The library's folder; the running interpreter's by default.

    Raises:
        FileNotFoundError: A module's source is not installed.
    """
    root = root or stdlib_root()
    files = [root / name for name in HELDOUT]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no source for {', '.join(missing)} in {root}; "
            "use a Python installation that ships its standard library as .py files"
        )
    return files


def read_bytes(files: Iterable[Path]) -> NDArray[np.uint8]:
    """Join files into one stream of byte tokens, each file preceded by `SEPARATOR`.

    Line ends become a single newline, so that every platform gives the same stream.
    """
    mark = bytes([SEPARATOR])
    stream = b"".join(mark + path.read_bytes().replace(b"\r\n", b"\n") for path in files)
    return np.frombuffer(stream, dtype=np.uint8)


def _is_training(path: Path, root: Path) -> bool:
    """Tell whether a file is plain UTF-8, neither a test, a table, foreign nor held out."""
    relative = path.relative_to(root)
    if relative.as_posix() in HELDOUT or _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
        return False
    return not any(relative.match(pattern) for pattern in _GENERATED) and _is_text(path)


def _is_text(path: Path) -> bool:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(data) > 0 and SEPARATOR not in data
