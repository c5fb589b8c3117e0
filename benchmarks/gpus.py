"""What a GPU can do by its data sheet, and how long a launch keeps each of its units busy."""

import re
from dataclasses import dataclass

from compiled import Compiled, Launch

COPY = 0.92
"""Share of the memory's nominal bandwidth that a copy reaches (an assumption, for every GPU)."""

TENSOR_BYTES = 256 << 20
"""Size of the tensor over which a persistent program's start is spread."""


@dataclass(frozen=True)
class GPU:
    """The vendor's figures: the highest clock, dense products without sparsity."""

    name: str
    arch: str
    multiprocessors: int
    hertz: float
    lanes: int
    """Instructions of threads that a multiprocessor issues per cycle."""
    bytes_per_second: float
    flops16: float
    """bf16 and fp16 on matrix units."""
    flops32: float
    """float32 on matrix units that multiply it as it is, 0 without any."""
    flops64: float
    """Outside of matrix units."""

    def budget(self, width: float) -> float:
        """Instructions per element that can be issued while memory moves ``width`` bytes.

        multiprocessors · clock · lanes / (bandwidth / width), at the full nominal bandwidth.
        """
        return self.multiprocessors * self.hertz * self.lanes * width / self.bytes_per_second


GPUS = (
    GPU("A100", "sm_80", 108, 1.41e9, 128, 2.039e12, 312e12, 0, 9.7e12),
    GPU("H100", "sm_90", 132, 1.98e9, 128, 3.35e12, 989e12, 0, 33.5e12),
    GPU("H200", "sm_90", 132, 1.98e9, 128, 4.8e12, 989e12, 0, 33.5e12),
    GPU("B200", "sm_100", 148, 1.965e9, 128, 8.0e12, 2250e12, 0, 37e12),
    GPU("MI300X", "gfx942", 304, 2.1e9, 64, 5.3e12, 1307e12, 163.4e12, 81.7e12),
)


def tightest(arch: str) -> GPU:
    """Of the GPUs of an architecture, the one with the fewest instructions per byte."""
    return min((gpu for gpu in GPUS if gpu.arch == arch), key=lambda gpu: gpu.budget(1))


def per_element(launch: Launch, code: Compiled, gpu: GPU) -> float:
    """Instructions of threads per element of a large tensor."""
    tiles = 1.0
    if launch.resident:
        count = TENSOR_BYTES / (launch.elements * launch.width / 2)
        tiles = max(1.0, count / (launch.resident * gpu.multiprocessors))
    return (code.per_tile + code.once / tiles) * code.threads / launch.elements


def seconds(launch: Launch, code: Compiled, gpu: GPU) -> dict[str, float]:
    """Time per element that memory, issue and products each need alone."""
    issue = per_element(launch, code, gpu) / (gpu.multiprocessors * gpu.hertz * gpu.lanes)
    products = code.products * sum(dot.operations for dot in launch.dots) / launch.elements
    flops = gpu.flops16
    if code.unit.startswith(("DFMA", "v_fma")):
        flops = gpu.flops64
    elif code.unit.startswith(("DADD", "v_add")):  # and a product apart
        flops = gpu.flops64 / 2
    elif re.match(r"v_mfma_f32_\d+x\d+x\d+_?f32", code.unit):
        flops = gpu.flops32
    return {
        "memory": launch.width / (COPY * gpu.bytes_per_second),
        "issue": issue,
        "products": 2 * products / flops,
    }
