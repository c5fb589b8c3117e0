"""The command line: ``fastrot plan``, ``rotate``, ``verify``, ``architectures`` and ``demo``.

Exit status: 0 done, 1 a checkpoint failed verification, 2 refused, 130 interrupted.
"""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastrot.cli.arguments import parser

LONGEST_MESSAGE = 800
EXPECTED = (ValueError, TypeError, OSError, KeyError, RuntimeError, ImportError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(argv)
        with _quiet():
            status: int = args.command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("fastrot: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads the output, such as head, has seen enough; Python must not flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED as error:
        if debug:
            raise
        print(f"fastrot: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return status


def _one_line(error: Exception) -> str:
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    message = message or type(error).__name__
    return textwrap.shorten(message, LONGEST_MESSAGE, placeholder=" … (--debug shows all)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from transformers, and no progress bars where nobody watches."""
    from transformers.utils import logging

    settings: Any = logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    if not sys.stderr.isatty():
        settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
