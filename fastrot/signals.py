"""Hold Ctrl-C and termination while something runs that must not stop half way."""

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TERMINATIONS = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
HELD = (signal.SIGINT, *TERMINATIONS)


@contextmanager
def held_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the block has ended, then deliver them.

    Python runs signal handlers in the main thread alone, so that there is nothing to hold in
    another one. A handler that was not installed by Python is left alone: it raises nothing. Blocks
    may be nested; the outermost delivers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in HELD}
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number not in arrived:
            arrived.append(number)

    try:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, note)
        yield
    finally:
        try:
            _put_back([item for item in before.items() if item[1] is not None])
        finally:
            _deliver([(number, before[number]) for number in arrived])


def _put_back(handlers: list[tuple[int, Any]]) -> None:
    """Install all of them, whatever those that are back already raise meanwhile."""
    try:
        while handlers:
            signal.signal(*handlers[-1])
            handlers.pop()
    finally:
        if handlers:
            _put_back(handlers)


def _deliver(arrived: list[tuple[int, Any]]) -> None:
    """Hand over to the handlers, which are called: asyncio was told by the first arrival."""
    try:
        while arrived:
            number, handler = arrived.pop(0)
            if callable(handler):
                handler(number, inspect.currentframe())
            else:
                signal.raise_signal(number)
    finally:
        if arrived:
            _deliver(arrived)
