"""Threads of the CPU kernels: none outlives the call that started it."""

import _thread
from collections.abc import Callable
from contextlib import suppress

from fastrot.signals import held_signals


def on_threads(work: Callable[[int], None], count: int) -> None:
    """Call ``work(0)`` here and ``work(1)`` … ``work(count - 1)`` at the same time.

    Kernels write to bare addresses, so that a thread that goes on after an interrupt would write
    into weights that are being restored, or into freed memory: signals wait until all have ended.
    A machine that gives no more threads gets the work done by those that are there, so ``work``
    must take its tasks from a source that all share.
    """
    if count < 2:
        work(0)
        return
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    def alongside(index: int, running: _thread.LockType) -> None:
        guarded(index)
        running.release()

    with held_signals():
        others: list[_thread.LockType] = []
        # Not threading.Thread, which waits until the thread runs: waking a core that sleeps may
        # take as long as the transform of some megabytes, and this one can begin meanwhile.
        try:
            with suppress(RuntimeError, MemoryError):
                for index in range(1, count):
                    running = _thread.allocate_lock()
                    running.acquire()
                    _thread.start_new_thread(alongside, (index, running))
                    others.append(running)
            guarded(0)
        finally:
            for running in others:
                running.acquire()
    if errors:
        raise errors[0]
