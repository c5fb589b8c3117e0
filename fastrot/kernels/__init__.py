"""Fast Walsh-Hadamard transforms: the specification and its implementations."""

from fastrot.kernels.op import IMPLEMENTATIONS, hadamard_transform

__all__ = ["IMPLEMENTATIONS", "hadamard_transform"]
