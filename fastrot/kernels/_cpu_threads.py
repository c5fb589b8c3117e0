"""Threads of the CPU kernels: those that torch keeps, or some that end with the call."""

import _thread
import ctypes
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastrot.kernels._cpu_compile import Kernel
from fastrot.signals import held_signals

_FORKED = 0x40
"""``PF_FORKNOEXEC`` among the flags in proc_pid_stat(5)."""


def on_threads(kernel: Kernel, call: bytes, count: int, team: int) -> None:
    """Run ``kernel(call)`` on this thread and on others at the same time.

    Kernels write to bare addresses, so that a thread that goes on after an interrupt would write
    into weights that are being restored, or into freed memory: all have ended when this returns.
    It may be any number up to ``team`` (OpenMP gives one inside of a parallel region, and a machine
    may give no more), so ``kernel`` must take its tasks from a source that all share.

    Args:
        kernel: what runs.
        call: its argument.
        count: threads that find work.
        team: threads that torch uses. All of them are called: OpenMP ends those that are not in a
            smaller team, and torch would have to start them anew.
    """
    if count < 2:
        kernel(call)
        return
    parallel = _openmp(os.getpid())
    if parallel is not None:
        parallel(kernel.code.address, call, team, 0)
    else:
        _on_new_threads(kernel, call, count)


@lru_cache
def _openmp(process: int) -> Any:
    """``GOMP_parallel`` of the OpenMP runtime on which torch runs, or None.

    Threads of torch stay, and are awake for a while after they worked. Waking a core that sleeps
    takes as long as the transform of some megabytes. A ``process`` that was forked has none of
    them, and the runtime, which does not know, would wait for ever.
    """
    if process != _home() or _is_forked():
        return None
    libraries = Path(torch.__file__).parent / "lib"
    for path in libraries.glob("libtorch_cpu.*"):
        with suppress(OSError, AttributeError):  # what this library is linked to is searched, too
            parallel = ctypes.CDLL(str(path)).GOMP_parallel
            parallel.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint
            parallel.restype = None
            return parallel
    return None


@lru_cache
def _home() -> int:
    """The process that asked first."""
    return os.getpid()


def _is_forked() -> bool:
    """Whether this process began as a copy of another; Linux says so, elsewhere nobody."""
    try:
        state = Path("/proc/self/stat").read_bytes()
    except OSError:
        return False
    return bool(int(state.rpartition(b")")[2].split()[6]) & _FORKED)


def _on_new_threads(kernel: Kernel, call: bytes, count: int) -> None:
    native = kernel.native  # compiled once, and by a thread that may fail

    def alongside(running: _thread.LockType) -> None:
        native(call)
        running.release()

    with held_signals():
        others: list[_thread.LockType] = []
        # Not threading.Thread, which waits until the thread runs: this one can begin meanwhile.
        try:
            with suppress(RuntimeError, MemoryError):
                for _ in range(1, count):
                    running = _thread.allocate_lock()
                    running.acquire()
                    _thread.start_new_thread(alongside, (running,))
                    others.append(running)
            native(call)
        finally:
            for running in others:
                running.acquire()
