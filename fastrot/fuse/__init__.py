"""The weight part of a plan: norm folding and rotations, each weight rounded once."""

from fastrot.fuse.execute import execute
from fastrot.fuse.journal import Journal

__all__ = ["Journal", "execute"]
