"""Rotations: orthogonal matrices as products of stages."""

from fastrot.rotations.base import GIVEN, KINDS, MATRIX, PERMUTATION, Rotation, RotationKind
from fastrot.rotations.operands import digest

__all__ = ["GIVEN", "KINDS", "MATRIX", "PERMUTATION", "Rotation", "RotationKind", "digest"]
