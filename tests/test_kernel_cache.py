"""The compiled CPU kernels on disk: whatever became of them, a process transforms."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from fastrot.kernels import _cpu_blocks
from fastrot.kernels._cpu_blocks import take
from fastrot.kernels._cpu_compile import _SOURCES, Kernel, _digest


def double(at):
    take(at, take(at, 0))


def first():
    """How many kernels one made anew, which stands for a new process, finds on disk."""
    doubled, argument = Kernel(double), struct.pack("=q", 21)
    doubled(argument)
    assert struct.unpack("=q", argument) == (42,)
    return doubled.code.cache_hits


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(double, "__qualname__", "double")
    return tmp_path / "cache"


def damage(folder, kind, how):
    paths = list(folder.rglob(f"*.{kind}"))
    assert paths
    for path in paths:
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": b"noise"}[how])


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("how", ["empty", "half", "noise"])
def test_a_damaged_cache_heals(folder, kind, how):
    assert [first(), first()] == [0, 1]
    damage(folder, kind, how)
    assert [first(), first()] == [0, 1]


def test_a_folder_that_vanishes(folder):
    assert first() == 0
    doubled = Kernel(double)
    for path in folder.rglob("*.nb?"):
        path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir()
    folder.rmdir()
    folder.touch()
    assert doubled.code.address


def test_every_file_that_makes_code_is_in_the_name(tmp_path, monkeypatch):
    package = Path(_cpu_blocks.__file__).parents[1]
    codes = ("blocks", "compile", "kernels", "parts", "rows", "vectors")
    names = ["hadamard.py", *(f"kernels/_cpu_{code}.py" for code in codes)]
    monkeypatch.setattr(_cpu_blocks, "__file__", str(tmp_path / "kernels" / "_cpu_blocks.py"))
    (tmp_path / "kernels").mkdir()
    sources = {tmp_path / name: (package / name).read_bytes() for name in names}
    for path, source in sources.items():
        path.write_bytes(source)
    assert _digest() == _SOURCES
    for path, source in sources.items():
        path.write_bytes(source + b"\n")
        assert _digest() != _SOURCES, path
        path.write_bytes(source)


CHILD = """
import sys, torch
from fastrot.kernels import _cpu_kernels, hadamard_transform
if len(sys.argv) > 1:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
x = torch.eye(24)
assert torch.equal(hadamard_transform(hadamard_transform(x), transpose=True), 24 * x)
print(_cpu_kernels.in_float32.code.cache_hits)
"""


@pytest.mark.slow
def test_a_full_disk_and_a_damaged_cache_of_all_kernels(tmp_path):
    def child(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert child("1024") == 0  # no file may be larger, as on a disk that is full
    assert [child(), child()] == [0, 1]
    assert len(list(tmp_path.rglob("*.nbc"))) == 1  # its parts lie inside the kernel
    damage(tmp_path, "nbc", "half")
    assert [child(), child()] == [0, 1]
