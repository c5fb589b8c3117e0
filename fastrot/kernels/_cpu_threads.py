"""Threads of the CPU kernels: those that torch keeps, or some that end with the call."""

import _thread
import ctypes
import multiprocessing
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastrot.kernels._cpu_compile import Kernel
from fastrot.signals import held_signals


def on_threads(kernel: Kernel, call: bytes, count: int) -> None:
    """Run ``kernel(call)`` on this thread and on ``count - 1`` others at the same time.

    Kernels write to bare addresses, so that a thread that goes on after an interrupt would write
    into weights that are being restored, or into freed memory: all have ended when this returns. A
    machine that gives no more threads gets the work done by those that are there, so ``kernel``
    must take its tasks from a source that all share.

    Args:
        kernel: what runs.
        call: its argument.
        count: threads.
    """
    if count < 2:
        kernel(call)
        return
    team = _openmp()
    if team is not None and _home() == os.getpid():
        team(kernel.code.address, call, count, 0)
    else:
        _on_new_threads(kernel, call, count)


@lru_cache
def _home() -> int:
    """The process that asked first: one that is forked from it has none of its threads."""
    return os.getpid()


@lru_cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime on which torch runs, or None.

    Threads of torch stay, and are awake for a while after they worked. Waking a core that sleeps
    takes as long as the transform of some megabytes.
    """
    if type(multiprocessing.current_process()).__name__ == "ForkProcess":
        return None
    libraries = Path(torch.__file__).parent / "lib"
    for path in libraries.glob("libtorch_cpu.*"):
        with suppress(OSError, AttributeError):  # what this library is linked to is searched, too
            team = ctypes.CDLL(str(path)).GOMP_parallel
            team.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint
            team.restype = None
            return team
    return None


def _on_new_threads(kernel: Kernel, call: bytes, count: int) -> None:
    def alongside(running: _thread.LockType) -> None:
        kernel(call)
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
            kernel(call)
        finally:
            for running in others:
                running.acquire()
