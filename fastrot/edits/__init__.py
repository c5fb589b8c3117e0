"""The plan of a rotation, and what it is made of: values, without a model."""

from fastrot.edits.plan import Plan
from fastrot.edits.steps import FoldedNorm, OnlineSite, Part, Rotate, Scale, WeightEdit

__all__ = ["FoldedNorm", "OnlineSite", "Part", "Plan", "Rotate", "Scale", "WeightEdit"]
