"""Every launch that fastrot ships, by architecture.

A new kernel gets one function that describes its launches, in `launches.py` or
`fused_launches.py`, which :func:`shipped` yields; the gates of tests/test_triton_compile.py follow
from that.
"""

from collections.abc import Hashable, Iterator

import torch
from compiled import Launch
from fused_launches import fused_launches, pass_launches, rope_launches
from launches import few_launch, transform
from measure.cases import MAIN

SIZES = (*MAIN, 65536, 29568, 2880, 18944, 28672)
"""Sizes of transforms that reach every configuration, together with :data:`SMALL`."""

SMALL = (40, 68, 80, 96, 172, 284, 768, 896)
"""Sizes that reach the tiles which :data:`SIZES` does not, with padding and without."""


TRANSFORMS = ("_rows_kernel", "_few_kernel", "_axis_kernel", "_axis64_kernel")
"""Kernels whose launches stand for others."""


def shipped(arch: str) -> Iterator[Launch]:
    """One launch of each configuration that a transform takes, and those of all other kernels.

    A configuration is a kernel with its tile, dtypes and kinds of matrices; the first size that
    takes one stands for it. fp16 compiles as bf16 does, but for its conversions.
    """
    seen = set()
    for launch in (*transforms(arch), *fused_launches(arch), *rope_launches(arch)):
        key = configuration(launch)
        if key not in seen:
            seen.add(key)
            yield launch
    yield from pass_launches(arch)


def transforms(arch: str) -> Iterator[Launch]:
    """Transforms of all dtypes and, in bfloat16, with signs."""
    for signs, sizes, dtypes in (
        ("", (*SIZES, *SMALL), (torch.bfloat16, torch.float32, torch.float64)),
        ("signs", MAIN, (torch.bfloat16,)),
        ("transposed", MAIN, (torch.bfloat16,)),
    ):
        for dtype in dtypes:
            for n in sizes:
                for dim in (-1, 0):
                    yield from transform(n, dtype, dim, arch, signs)
                few = few_launch(n, dtype, arch, signs)
                if few is not None:
                    yield few


def configuration(launch: Launch) -> Hashable:
    """What two launches of :func:`shipped` differ in."""
    if launch.kernel_name not in TRANSFORMS:
        return launch.name
    kinds = () if launch.signed else ("LEFT", "RIGHT", "KIND", "FLAT")
    marks = ("A", "B", "SIGNS", *kinds, *["TRANSPOSE"] * launch.signed)
    values = (launch.constants.get(mark) for mark in marks)
    return (launch.kernel_name, *launch.ends, *values)
