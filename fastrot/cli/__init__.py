"""The command line: ``fastrot plan``, ``rotate``, ``verify``, ``serve`` and others.

Exit status: 0 done, 1 a checkpoint failed verification, 2 refused, 129 hung up, 130 interrupted,
143 terminated.
"""

import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from fastrot.checkpoint.source import uncollected
from fastrot.cli.arguments import parser
from fastrot.cli.output import discard, escape
from fastrot.signals import TERMINATIONS

LONGEST_MESSAGE = 800
EXPECTED = (ValueError, TypeError, OSError, LookupError, RuntimeError, ImportError, MemoryError)


class Terminated(BaseException):
    """A signal asks the process to end; it cleans up, as after Ctrl-C."""

    def __init__(self, number: int):
        self.status = 128 + number


def run() -> NoReturn:
    """Run the command of this process, and end it.

    To take down all modules at the end, object by object, would be a seventh of a short command.
    """
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    escape()
    try:
        with _terminable():
            args = parser().parse_args(argv)
            with _quiet():
                status: int = args.command(args)
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("fastrot: interrupted", file=sys.stderr)
        return 130
    except Terminated as error:
        print("fastrot: terminated", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        # Whoever reads the output, such as head, has seen enough.
        discard()
        return 0
    except EXPECTED as error:
        if debug:
            raise
        print(f"fastrot: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return status


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a signal that would end the process at once raise instead, unless someone handles it."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        for other in ours:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in TERMINATIONS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _one_line(error: Exception) -> str:
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    message = message or type(error).__name__
    return textwrap.shorten(message, LONGEST_MESSAGE, placeholder=" … (--debug shows all)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from torch and transformers, and no progress bars where nobody watches."""
    with uncollected():
        from transformers.utils import logging

    settings: Any = logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    if not sys.stderr.isatty():
        settings.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|transformers")
            yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
