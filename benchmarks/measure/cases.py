"""Which cases are run: sizes, shapes and dtypes, the most important first."""

import importlib.util
import json
from typing import Any

import torch

Job = dict[str, Any]
"""A case, or its result: what is written to the file."""

MAIN = (4096, 14336, 8192, 128, 1024, 11008, 16384, 32768)
"""The sizes that matter most: heads, hidden and intermediate sizes, and the bounds we promise."""

SIZES = (
    *MAIN,
    *(64, 256, 512, 2048, 65536, 13824, 18944, 29568, 10944, 9728, 27648, 53248, 2880, 3072),
)
ROWS = (16, 256, 4096, 65536)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FUSED = {
    **dict.fromkeys(("int8", "fp8", "mxfp4"), (4096, 14336, 8192, 1024, 11008, 16384)),
    **dict.fromkeys(("int4", "nvfp4"), (4096, 14336)),
    **dict.fromkeys(("fp8, blocks", "mxfp4, blocks", "nvfp4, blocks"), (4096, 14336)),
    **dict.fromkeys(("SiLU, fp8", "SiLU, mxfp4", "SiLU"), (14336, 8192, 11008)),
    **dict.fromkeys(("RMSNorm, fp8, blocks", "RoPE"), (4096, 1024)),
}
"""The fused operators and the sizes of their tokens."""

TENSOR_BYTES = 256 << 20
"""Of the tensors that show bandwidth, several times any cache."""

MAX_BYTES = 4 << 30


def case(operator: str, n: int, rows: int, dtype: str, dim: int = -1, signs: bool = False) -> Job:
    """A job that checks and times one operator; ``rows`` vectors of length n along ``dim``."""
    keys = ("kernel", "n", "rows", "dtype", "dim", "signs")
    return dict(zip(keys, (operator, n, rows, dtype, dim, signs), strict=True))


def large(n: int, dtype: str) -> int:
    """Vectors of a tensor that shows bandwidth."""
    return -(-TENSOR_BYTES // (n * DTYPES[dtype].itemsize) // 64) * 64


def nbytes(job: Job) -> int:
    """Of its tensor; a model counts as none."""
    return job["rows"] * job["n"] * DTYPES[job["dtype"]].itemsize if "rows" in job else 0


def plan(quick: bool) -> list[Job]:
    """All jobs, the most important first."""
    sizes = MAIN if quick else SIZES
    model = {"model": "Llama 1B" if quick else "Llama 8B", "rotations": ["R1", "R2", "R4"]}
    jobs = [case("transform", n, large(n, "bf16"), "bf16") for n in sizes]
    jobs += [case("transform", n, 1, "bf16") for n in sizes]
    fused = [(name, n) for name, sizes in FUSED.items() for n in (sizes[:1] if quick else sizes)]
    jobs += [{"kernel": "apply", **model, "repeat": 3}]
    if importlib.util.find_spec("llmcompressor"):
        jobs += [{"kernel": "llm-compressor", **model}]
    jobs += [case(name, n, large(n, "bf16"), "bf16") for name, n in fused]
    for dtype in ("fp32", "fp16"):
        jobs += [case("transform", n, large(n, dtype), dtype) for n in sizes]
    for dtype in ("bf16", "fp32"):
        jobs += [case("transform", n, large(n, dtype), dtype, dim=0) for n in sizes]
    jobs += [case(name, n, rows, "bf16") for rows in (1, 16) for name, n in fused]
    for n in sizes:
        jobs += [case("in place", n, large(n, "bf16"), "bf16")]
        jobs += [case("transform", n, large(n, "bf16"), "bf16", signs=True)]
    grid = () if quick else ROWS
    jobs += [case("transform", n, rows, "bf16") for rows in grid for n in sizes]
    jobs += [case("transform", n, rows, d) for d in ("fp32", "fp16") for rows in grid for n in MAIN]
    jobs += [case("transform", n, 1, dtype) for dtype in ("fp32", "fp16") for n in sizes]
    jobs += [case("in place", n, large(n, "bf16"), "bf16", dim=0) for n in sizes]
    jobs += [case("transform", n, large(n, "bf16"), "bf16", 0, True) for n in MAIN]
    once = {json.dumps(job): job for job in jobs if nbytes(job) <= MAX_BYTES}
    return list(once.values())


def dry_plan() -> list[Job]:
    """Every path once, in Triton's interpreter."""
    jobs = [case("transform", n, 3, dtype) for n in (64, 96) for dtype in ("bf16", "fp32")]
    jobs += [case("transform", 64, 3, "fp16", 0), case("transform", 64, 3, "bf16", signs=True)]
    jobs += [case("in place", 12, 3, "fp32", 0)]
    jobs += [case(name, 64, 3, "bf16") for name in FUSED]
    return [*jobs, {"kernel": "apply", "model": "tiny", "rotations": ["R1", "R2"], "repeat": 1}]
