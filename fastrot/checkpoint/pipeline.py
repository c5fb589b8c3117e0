"""Reading, rotating, writing and syncing at once, in memory that is bounded and used again."""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastrot.checkpoint.device import CPU, Memory, own_stream, settled
from fastrot.checkpoint.header import header_of, read_into
from fastrot.checkpoint.outputs import OutputFile
from fastrot.checkpoint.panels import Norms, Panel, panels_of
from fastrot.checkpoint.target import settle
from fastrot.kernels.weight import Workspace
from fastrot.signals import held_signals

PAGE = 1 << 20
SETTLED = 1 << 28
"""Bytes of a file that the system may hold in memory before they go to the disk."""


class StoppedError(Exception):
    """Another stage has failed."""


class Buffers:
    """Memory for panels, used again: to touch fresh pages costs more than a transform.

    Args:
        most: bytes in use, but a single panel may be larger.
        device: where panels are rotated; if it has memory of its own, as much of that.
    """

    def __init__(self, most: int, device: torch.device = CPU):
        self._most, self._device = most, device
        self._used, self._stopped = 0, False
        self._free: list[Memory] = []
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> Memory:
        """Memory of at least ``nbytes``, once there is room.

        Raises:
            StoppedError: :meth:`stop` was called.
        """
        size = -(-max(nbytes, 1) // PAGE) * PAGE
        with self._changed:
            while self._used and self._used + size > self._most and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise StoppedError
            room = max(size, self._most - self._used)
            fits = [memory for memory in self._free if size <= memory.nbytes <= room]
            if fits:
                memory = min(fits, key=lambda memory: memory.nbytes)
                self._free = [other for other in self._free if other is not memory]
                self._used += memory.nbytes
                return memory
            while self._free and sum(m.nbytes for m in self._free) > room - size:
                self._free.pop(0)
            self._used += size
        return Memory.on(self._device, size)

    def give(self, memory: Memory) -> None:
        """Take memory back."""
        with self._changed:
            self._used -= memory.nbytes
            self._free.append(memory)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _Loaded:
    """A panel on its way; without one the end of a file."""

    file: OutputFile
    panel: Panel | None = None
    memory: Memory | None = None


class _Written(NamedTuple):
    """A file that has grown, or is whole."""

    file: OutputFile
    part: Path
    whole: bool


class Pipeline:
    """Four stages: one thread reads, the caller's rotates, one writes, one brings to the disk.

    Who reads also copies to the device, and who writes from it.

    Args:
        files: what to write, one after the other.
        norms: the weights of folded norms.
        part_of: where a file is written until it is whole.
        finish: gives a file that is whole, and on the disk, its name.
        device: where panels are rotated.
        memory: bytes for panels; the scratch memory of kernels comes on top.
        scratch: bytes of that.
        most: bytes of a panel of what may be cut.
        progress: is told of the bytes that were written.
    """

    def __init__(
        self,
        files: Sequence[OutputFile],
        norms: Norms,
        part_of: Callable[[OutputFile], Path],
        finish: Callable[[OutputFile, Path], None],
        *,
        device: torch.device = CPU,
        memory: int,
        scratch: int,
        most: int,
        progress: Callable[[int], object],
    ):
        self._files, self._norms, self._most = files, norms, most
        self._part_of, self._finish, self._progress = part_of, finish, progress
        self._device, self._scratch = device, scratch
        self._buffers = Buffers(memory, device)
        self._loaded: queue.SimpleQueue[_Loaded | None] = queue.SimpleQueue()
        self._rotated: queue.SimpleQueue[_Loaded | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[_Written | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Write all files.

        Raises:
            RotationError: a number that is not finite, or a source that was cut short.
            OSError: no room, or a disk that fails.
            KeyboardInterrupt: the file that was being written is gone, those before it are whole.
        """
        threads = [
            threading.Thread(target=self._guarded, args=(stage,), name=f"fastrot-{name}")
            for name, stage in (
                ("read", self._read),
                ("write", self._write),
                ("settle", self._settle),
            )
        ]
        try:
            with held_signals():  # else one that arrives now leaves stages that wait for ever
                for thread in threads:
                    thread.start()
            self._rotate()
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._stop(error)
        # Nobody writes behind the back of whoever takes the error, a second Ctrl-C or not.
        with held_signals():
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            raise self._failure

    def _stop(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._buffers.stop()
        self._loaded.put(None)
        self._rotated.put(None)

    def _guarded(self, stage: Callable[[], None]) -> None:
        try:
            with own_stream(self._device):
                stage()
        except BaseException as error:
            self._stop(error)

    def _read(self) -> None:
        for file in self._files:
            with ExitStack() as opened:
                descriptors: dict[Path, int] = {}
                for task in file.tasks:
                    source = task.source
                    if source.file not in descriptors:
                        stream = opened.enter_context(source.file.open("rb", buffering=0))
                        descriptors[source.file] = stream.fileno()
                    for rows in panels_of(task, self._most):
                        panel = Panel(task, rows)
                        start, length = panel.read
                        memory = self._buffers.take(panel.nbytes)
                        read_into(
                            descriptors[source.file],
                            source,
                            start,
                            memory.host.numpy().data[:length],
                        )
                        memory.send(panel)
                        self._loaded.put(_Loaded(file, panel, memory))
            self._loaded.put(_Loaded(file))
        self._loaded.put(None)

    def _rotate(self) -> None:
        workspace = Workspace(self._scratch, 0, self._device)
        while (item := self._loaded.get()) is not None and self._failure is None:
            if item.panel is not None and item.panel.acts:
                assert item.memory is not None
                item.panel.rotate(item.memory.work, self._norms, workspace)
                settled(self._device)
            self._rotated.put(item)
        self._rotated.put(None)

    def _write(self) -> None:
        try:
            for file in self._files:
                part = self._part_of(file)
                with _whole_or_gone(part):
                    self._write_file(file, part)
                self._written.put(_Written(file, part, True))
        finally:
            self._written.put(None)

    def _settle(self) -> None:
        """Bring files to the disk as they grow, and give them their names when they are whole."""
        while (item := self._written.get()) is not None:
            try:
                with _whole_or_gone(item.part):
                    settle(item.part)
                    if item.whole:
                        self._finish(item.file, item.part)
            except BaseException as error:  # those behind are whole, and get their names still
                if item.whole or not isinstance(error, FileNotFoundError):  # else who wrote knows
                    self._stop(error)

    def _write_file(self, file: OutputFile, part: Path) -> None:
        head, starts = header_of(file.layouts, file.metadata)
        grown = 0
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_at(descriptor, memoryview(head), 0)
            for name, tensor in file.constants.items():
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                _write_at(descriptor, raw.data, starts[name])
            while (item := self._rotated.get()) is not None and self._failure is None:
                if item.panel is None:
                    return
                assert item.memory is not None
                raw = item.memory.fetch(item.panel).numpy()
                start = starts[item.panel.task.name] + item.panel.wrote[0]
                _write_at(descriptor, raw.data, start)
                self._buffers.give(item.memory)
                self._progress(len(raw))
                grown += len(raw)
                if grown >= SETTLED:
                    self._written.put(_Written(file, part, False))
                    grown = 0
            raise StoppedError
        finally:
            os.close(descriptor)


@contextmanager
def _whole_or_gone(part: Path) -> Iterator[None]:
    """Remove a file that could not be written, and say where that was."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise OSError(
                f"{part.parent}: the weights can't be written: {error.strerror}"
            ) from error
        raise


def _write_at(descriptor: int, raw: memoryview, offset: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, raw[done:], offset + done)
