"""Rotations: orthogonal matrices as products of stages."""

from fastrot.rotations.base import KINDS, MATRIX, Rotation, RotationKind
from fastrot.rotations.operands import digest

__all__ = ["KINDS", "MATRIX", "Rotation", "RotationKind", "digest"]
