"""Fast Walsh-Hadamard transforms: the specification and its implementations."""

from fastrot.kernels.arguments import IMPLEMENTATIONS
from fastrot.kernels.formats import Quantization, Quantized
from fastrot.kernels.fused import glu_hadamard, hadamard_quantize, rmsnorm_hadamard
from fastrot.kernels.op import hadamard_transform
from fastrot.kernels.rope import RotatedHeads, rope_hadamard

__all__ = [
    "IMPLEMENTATIONS",
    "Quantization",
    "Quantized",
    "RotatedHeads",
    "glu_hadamard",
    "hadamard_quantize",
    "hadamard_transform",
    "rmsnorm_hadamard",
    "rope_hadamard",
]
