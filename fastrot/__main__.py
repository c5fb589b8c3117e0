"""``python -m fastrot``."""

from fastrot.cli import run

run()
