"""The weight part of a plan: norm folding and rotations, each weight rounded once."""

from fastrot.fuse.fusion import Fusion, rotated
from fastrot.fuse.writes import scale_of

__all__ = ["Fusion", "rotated", "scale_of"]
