"""The weight part of a plan: norm folding and rotations, each weight rounded once."""

from fastrot.fuse.fusion import Fusion

__all__ = ["Fusion"]
