"""What the command line says, and that nobody need listen."""

import os
import sys


def announce(text: str) -> None:
    """Say what was done: it stays done if standard output is closed, or full."""
    try:
        print(text, flush=True)
    except OSError:
        discard()


def discard() -> None:
    """Let what is still to be written go nowhere, lest Python fail to write it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape() -> None:
    """Let what the terminal's encoding lacks be escaped: an arrow in a table, a path in bytes."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
