"""Threads of the CPU kernels: none outlives the call that started it."""

import threading
from collections.abc import Callable

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

    with held_signals():
        others: list[threading.Thread] = []
        for index in range(1, count):
            thread = threading.Thread(target=guarded, args=(index,), daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            others.append(thread)
        guarded(0)
        for thread in others:
            thread.join()
    if errors:
        raise errors[0]
