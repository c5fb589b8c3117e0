"""Checkpoints are written as a whole or not at all: beside their place, then moved there."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastrot.errors import RotationError
from fastrot.signals import held_signals

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves behind stays there
    fcntl = None  # type: ignore[assignment]

COMPANIONS = (
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
)
"""What belongs to a checkpoint besides weights and configurations; those are written anew."""

PREFIX = ".fastrot-unfinished-"


def check_target(source: Path, target: Path, needed: int) -> None:
    """Refuse, before any work, a folder that a checkpoint can't be written to.

    Args:
        source: the checkpoint that is read, resolved.
        target: the folder, resolved.
        needed: bytes that the weights will take at least.

    Raises:
        RotationError: it is the source, lies in it, or is a mount point.
        OSError: it is taken, its name is too long, where it should lie is no folder, or has no
            room.
    """
    with suppress(FileNotFoundError):
        target.lstat()  # tells of a name that no folder can have
    if target == source:
        raise RotationError(f"DST is SRC ({source}); give the rotated model a folder of its own")
    if source in target.parents:
        raise RotationError(f"DST ({target}) lies in SRC; give the rotated model a place outside")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty, and nothing is overwritten")
    if target.is_mount():
        raise RotationError(
            f"{target} is a mount point, which no finished folder can replace; name a new folder "
            "in it"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}, where {target.name} should lie, is not a folder")
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(
            f"{target.parent} has {free / 2**30:.1f} GiB free, and the weights alone need "
            f"{needed / 2**30:.1f} GiB"
        )


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its name if all goes well, and goes if not.

    What processes that were killed left there goes as well.

    Raises:
        OSError: nothing can be written there.
    """
    folder = target.with_name(PREFIX + secrets.token_hex(4))
    lock = None
    try:
        try:
            _sweep(target.parent)
            folder.mkdir()
            lock = _lock(folder)
        except OSError as error:
            raise OSError(f"{target.parent} can't be written to: {error.strerror}") from error
        yield folder
        _follow_umask(folder)
        folder.replace(target)
    except BaseException:
        with held_signals():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a lock until the process ends, however it ends; None if somebody else holds it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _follow_umask(folder: Path) -> None:
    """Give files the mode that the process gives: safetensors keeps them from everybody else."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor, chat templates and licence, if there are any."""
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
