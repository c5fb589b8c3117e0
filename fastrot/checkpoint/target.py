"""The folder that a checkpoint is written to, and what goes there besides weights."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from fastrot.errors import RotationError

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
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
)
"""What belongs to a checkpoint besides weights and their configuration."""


def check_target(source: Path, target: Path) -> None:
    """Refuse, before any work, a folder that a checkpoint can't be written to.

    Args:
        source: the checkpoint that is read, resolved.
        target: the folder, resolved.

    Raises:
        RotationError: it is the source, lies in it, or is a mount point.
        OSError: it is taken, its name is too long, or where it should lie is no folder.
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


def companions(source: Path) -> list[Path]:
    """Tokenizer, processor, chat templates and licence, as far as there are any."""
    return sorted({path for pattern in COMPANIONS for path in source.glob(pattern)})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a checkpoint besides weights and their configuration."""
    for path in companions(source):
        if path.is_dir():
            (folder / path.name).mkdir(exist_ok=True)
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def sync(path: Path) -> None:
    """Bring a file, or new names in a folder, to the disk.

    Raises:
        OSError: the disk fails, or the file system can't do it for a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(path: Path) -> None:
    """Bring a file to the disk, and let go of the memory in which the system keeps its pages.

    Those of the next file take their place: memory that a process has not had before is slow to
    get in virtual machines, and other files' pages stay.

    Raises:
        OSError: the disk fails.
    """
    sync(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def readable(nbytes: int) -> str:
    """A size as the command line takes it, rounded up: given back, it is enough."""
    if nbytes >= 1 << 30:
        return f"{-(-nbytes * 100 // (1 << 30)) / 100:.2f}G"
    return f"{-(-nbytes // (1 << 20))}M"


def exact(nbytes: int) -> str:
    """A size as the command line takes it, in the largest unit that leaves no fraction."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if nbytes and not nbytes % (1 << shift):
            return f"{nbytes >> shift}{unit}"
    return str(nbytes)
