"""Where a checkpoint grows: a folder beside its place, which takes its name when it is whole.

Files of the folder are the only state, so that a killed run is resumed by the same command, and any
number of workers share one folder. A file of weights that has its name is whole: it was written
under another name, brought to the disk, and then renamed; its head tells whose it is. Two workers
on one file are harmless.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastrot.checkpoint.device import arithmetic_of
from fastrot.checkpoint.outputs import Job, OutputFile
from fastrot.checkpoint.target import companions, copy_companions, readable, sync
from fastrot.errors import RotationError
from fastrot.signals import held_signals
from fastrot.version import __version__

PREFIX = ".fastrot-"
SUFFIX = ".unfinished"
MANIFEST = "fastrot-manifest.json"
FORMAT = 1
PAUSE = 0.2
"""Seconds between two looks at what other workers do."""


class Store:
    """The folder in which a job's result grows.

    Args:
        job: what is written.
        target: the folder that it becomes, resolved.
    """

    def __init__(self, job: Job, target: Path):
        self.job, self.target = job, target
        self.folder = unfinished(target)
        self._heads = {file.name: file.head for file in job.files}
        self._sizes = {file.name: len(self._heads[file.name]) + file.nbytes for file in job.files}
        self._own = f".{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.part"

    @property
    def manifest(self) -> dict[str, Any]:
        """What tells this job from another one."""
        return {
            "format": FORMAT,
            "fastrot": __version__,
            "rotations": str(self.job.plan).splitlines()[0],
            "device": arithmetic_of(self.job.device),
            "digest": self.job.digest,
            "sources": self.job.sources,
            "files": self._sizes,
        }

    def published(self) -> bool:
        """Whether the target is this job's result, whole."""
        there = _read(self.target / "config.json") == self.job.config
        return there and not self.missing(self.job.files, self.target)

    def tidy(self) -> None:
        """Remove what only a growing folder needs from the target, once it has its name."""
        if (self.target / MANIFEST).exists():
            for part in self.target.glob("*.part"):
                part.unlink(missing_ok=True)
            (self.target / MANIFEST).unlink(missing_ok=True)

    def open(self, fresh: bool = False) -> None:
        """Make the folder, or go on in the one that an earlier run left.

        Args:
            fresh: throw away what an earlier run left.

        Raises:
            RotationError: an earlier run of another job left it, or the source lies in it.
            OSError: there is no room, or nothing can be written there.
        """
        if self.folder in (self.job.source, *self.job.source.parents):
            raise RotationError(
                f"SRC ({self.job.source}) lies where DST would grow, in {self.folder}; move it, or "
                "give DST another name"
            )
        if fresh and self.folder.is_dir():
            shutil.rmtree(self.folder)
        there = self._begun()
        self._check_room()
        for companion in companions(self.job.source):
            companion.stat()
        try:
            with suppress(FileExistsError):
                self.folder.mkdir()
            if there is None:
                self._put(MANIFEST, json.dumps(self.manifest, indent=2))
        except OSError as error:
            raise OSError(f"{self.target.parent} can't be written to: {error.strerror}") from error
        self._sweep()

    def _begun(self) -> Mapping[str, Any] | None:
        """What the folder says of itself; None if nothing was begun in it."""
        there = _read(self.folder / MANIFEST)
        if there is None:
            found = {path.name: path for path in self.folder.glob("*.safetensors")}
            strange = [n for n, p in found.items() if n not in self._sizes or not self._is_whole(p)]
            if strange:
                raise RotationError(
                    f"{self.folder / MANIFEST} is missing or damaged, and {min(strange)} beside it "
                    "is not of this rotation; give --fresh to throw the folder away"
                )
        elif there != self.manifest:
            what = next((k for k, v in self.manifest.items() if there.get(k) != v), "manifest")
            raise RotationError(
                f"{self.folder} holds an unfinished rotation that differs in its {what} "
                f"({_short(there.get(what))}, now {_short(self.manifest.get(what))}); finish that "
                "one by the command that began it, or give --fresh to throw it away"
            )
        return there

    def _check_room(self) -> None:
        needed = sum(self._sizes[file.name] for file in self.missing(self.job.files))
        free = shutil.disk_usage(self.target.parent).free
        if needed > free:
            raise OSError(
                f"{self.target.parent} has {readable(free)} free, and the weights that are still "
                f"to be written need {readable(needed)}"
            )

    def _sweep(self) -> None:
        """Remove what dead workers of this machine were writing."""
        ours = re.compile(rf"\.{re.escape(_machine())}\.(\d+)\.\w+\.part$")
        for part in self.folder.glob("*.part"):
            found = ours.search(part.name)
            if found and not _alive(int(found[1])):
                part.unlink(missing_ok=True)

    def missing(self, files: Iterable[OutputFile], folder: Path | None = None) -> list[OutputFile]:
        """Those that are not whole yet in the folder, or in another one."""
        place = folder or self.folder
        return [file for file in files if not self._is_whole(place / file.name)]

    def _is_whole(self, file: Path) -> bool:
        head = self._heads[file.name]
        with suppress(OSError), file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return size == self._sizes[file.name] and stream.read(len(head)) == head
        return False

    def part_of(self, file: OutputFile) -> Path:
        """Where this process writes a file."""
        return self.folder / f"{file.name}{self._own}"

    def finish(self, file: OutputFile, part: Path) -> None:
        """Give a file that is whole its name.

        Raises:
            RotationError: ``--fresh`` of another rotation has taken the folder.
        """
        self._begun()
        part.replace(self.folder / file.name)
        _sync(self.folder)

    def publish(self) -> bool:
        """If all files are whole, complete the folder and give it its name.

        Returns:
            Whether it has it, by this process or by another.
        """
        if self.published():
            if _read(self.folder / MANIFEST) == self.manifest:
                shutil.rmtree(self.folder, ignore_errors=True)  # begun as another one finished
            return True
        if self.missing(self.job.files):
            return self.published()  # another may have given the folder its name between two looks
        self._begun()
        try:
            self._complete()
            with held_signals():
                self.folder.replace(self.target)
                _sync(self.target.parent)
                self.tidy()
        except OSError as error:
            if self.published():
                return True
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(
                f"{self.target} is not empty any more, and nothing is overwritten; the finished "
                f"checkpoint lies in {self.folder}, the same call gives it its name"
            ) from error
        return True

    def _complete(self) -> None:
        if [file.name for file in self.job.files] != ["model.safetensors"]:
            places = {name: file.name for file in self.job.files for name in file.layouts}
            index = {
                "metadata": {"total_size": self.job.nbytes},
                "weight_map": dict(sorted(places.items())),
            }
            self._put("model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        copy_companions(self.job.source, self.folder)
        self._put("config.json", json.dumps(self.job.config, indent=2) + "\n")
        mode = self.folder.stat().st_mode & 0o666
        for path in self.folder.rglob("*"):
            if path.is_file() and path.suffix != ".part":
                path.chmod(mode)
                _sync(path)
        _sync(self.folder)

    def _put(self, name: str, text: str) -> None:
        part = self.folder / f"{name}{self._own}"
        part.write_text(text, encoding="utf-8")
        _sync(part)
        part.replace(self.folder / name)

    def wait(self, quiet: float) -> bool:
        """Wait until other workers have written what is missing.

        Args:
            quiet: seconds without any change in the folder after which none seems to be left.

        Returns:
            Whether they have.
        """
        last: dict[str, int] | None = None
        since = time.monotonic()
        while True:
            if (now := self._state()) != last:
                if not self.missing(self.job.files) or self.published():
                    return True
                last, since = now, time.monotonic()
            elif time.monotonic() - since > quiet:
                return False
            time.sleep(PAUSE)

    def _state(self) -> dict[str, int]:
        state = {}
        for path in self.folder.glob("*"):
            with suppress(OSError):
                state[path.name] = path.stat().st_size
        return state

    def discard(self) -> None:
        """Remove the folder, unless it has files that are whole, or is another process's, too.

        A source that turned out to be damaged leaves nothing, a long run that was interrupted all
        that it finished.
        """
        others = (p for p in self.folder.glob("*.part") if not p.name.endswith(self._own))
        if _read(self.folder / MANIFEST) != self.manifest or any(others):
            return
        if len(self.missing(self.job.files)) < len(self.job.files):
            return
        with held_signals():
            shutil.rmtree(self.folder, ignore_errors=True)


def unfinished(target: Path) -> Path:
    """The folder in which a target grows."""
    name = os.fsencode(target.name)
    short = target.name if len(name) < 200 else hashlib.sha256(name).hexdigest()
    return target.with_name(f"{PREFIX}{short}{SUFFIX}")


def _machine() -> str:
    """Where the id of a process means something: a host, or a container on it."""
    space = Path("/proc/self/ns/pid")
    return socket.gethostname() + (f"-{space.stat().st_ino}" if space.exists() else "")


def _read(manifest: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    with suppress(OSError):  # some file systems can't
        sync(path)
