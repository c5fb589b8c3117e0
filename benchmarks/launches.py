"""The launches of a transform, as data; `fused_launches.py` has those of the other kernels."""

from typing import TYPE_CHECKING

import torch
from compiled import BACKENDS, Dot, Launch

from fastrot.hadamard import factors

if TYPE_CHECKING:
    from fastrot.kernels.gpu_axis import Factor
    from fastrot.kernels.gpu_tiles import Tile

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SHORT = {dtype: name for name, dtype in DTYPES.items()}

ODD = 4099
"""A number of tiles or vectors that is not a multiple of anything."""

COLUMNS = 8192
"""Vectors that lie side by side when they lie along the first dimension."""


def title(
    kernel: str, shape: str, source: torch.dtype, target: torch.dtype, signs: str = ""
) -> str:
    """The name of a launch."""
    return " ".join(filter(None, (kernel, shape, f"{SHORT[source]}-{SHORT[target]}", signs)))


def rows_launch(
    tile: "Tile",
    source: torch.dtype,
    target: torch.dtype,
    arch: str,
    signs: str = "",
) -> Launch:
    """A pass of :mod:`fastrot.kernels.gpu_rows`; ``signs`` are ``"signs"`` or ``"transposed"``."""
    from fastrot.kernels import gpu_rows
    from fastrot.kernels.gpu_matrix import TABLE, parts_of

    backend = BACKENDS[arch]
    transpose = signs == "transposed"
    c = gpu_rows.rows_constants(tile, source, target, bool(signs), transpose, backend)
    x, part = SHORT[source], SHORT[parts_of(source, backend)[0]]
    types = {
        "x": f"*{x}",
        "out": f"*{SHORT[target]}",
        "signs": "*i8" if signs else f"*{x}",
        "left": f"*{part}" if c["LEFT"] == TABLE.value else f"*{x}",
        "right": f"*{part}" if c["RIGHT"] == TABLE.value else f"*{x}",
        "scale": "fp32",
    }
    A, B, left, right = c["A"], c["B"], c["PARTS"] * bool(c["LEFT"]), c["MIDDLE_PARTS"]
    if c["BLOCK"] < B:
        trips = -(-c["COLUMNS"] // c["BLOCK"])
        dots = Dot(A, c["BLOCK"], A, left * trips), Dot(A, B, c["BLOCK"], right * trips)
    else:
        trips = -(-c["ROWS"] // c["CHUNK"])
        k = B if c["RIGHT"] == TABLE.value else c["Q"]
        dots = Dot(A, B, c["CHUNK"], left * trips), Dot(A, B, k, right, trips == 1)
    shape = f"{max(1, c['LEFT_SIZE'])}x{c['RIGHT_SIZE']} in {A}x{B}"
    narrowest = min(source.itemsize, target.itemsize)
    return Launch(
        name=title("rows", shape, source, target, signs),
        kernel=gpu_rows._rows_kernel,
        types=types,
        integers={"vectors": ODD, "tiles": ODD},
        constants=c,
        arch=arch,
        elements=c["ROWS"] * c["COLUMNS"],
        width=source.itemsize + target.itemsize,
        dots=dots,
        trips=trips,
        resident=tile.resident if c["PERSISTENT"] else 0,
        aligned=c["COLUMNS"] * narrowest % 16 == 0,
        signed=bool(signs),
        gathers=bool(signs) or TABLE.value in (c["LEFT"], c["RIGHT"]),
    )


def few_launch(n: int, dtype: torch.dtype, arch: str, signs: str = "") -> Launch | None:
    """The launch of :mod:`fastrot.kernels.gpu_few`, None if it does not take such vectors."""
    from fastrot.kernels import gpu_few
    from fastrot.kernels.gpu_matrix import TABLE, parts_of

    backend = BACKENDS[arch]
    exact = gpu_few.is_exact(dtype, bool(signs), signs == "transposed")
    cut = gpu_few.cut_for(*factors(n), exact, backend)
    if cut is None or dtype == torch.float64:
        return None
    c = gpu_few.few_constants(cut, dtype, bool(signs), signs == "transposed", backend)
    x, part = SHORT[dtype], SHORT[parts_of(dtype, backend)[0]]
    middle = SHORT[parts_of(torch.float32, backend)[0]]
    A, B, columns = c["A"], c["B"], c["BLOCK_B"]
    shape = f"{cut.a}x{cut.b} in {A}x{B}"
    return Launch(
        name=title("few", shape, dtype, dtype, signs),
        kernel=gpu_few._few_kernel,
        types={
            "x": f"*{x}",
            "out": f"*{x}",
            "signs": "*i8" if signs else f"*{x}",
            "left": f"*{middle}" if c["LEFT"] == TABLE.value else f"*{x}",
            "right": f"*{part}" if c["RIGHT"] == TABLE.value else f"*{x}",
            "scale": "fp32",
        },
        integers={},
        constants=c,
        arch=arch,
        elements=n,
        width=2 * dtype.itemsize,
        dots=(
            Dot(A, columns, B, c["PARTS"]),
            Dot(c["BLOCK_A"], columns, A, c["MIDDLE_PARTS"]),
        ),
        trips=1,
        resident=0,
        aligned=False,
        signed=bool(signs),
        few=True,
    )


def axis_launch(
    factor: "Factor",
    run: int,
    inner: int,
    source: torch.dtype,
    target: torch.dtype,
    arch: str,
    signs: str = "",
) -> Launch:
    """A pass of :mod:`fastrot.kernels.gpu_axis`, with runs of ``run`` elements behind the factor.

    ``inner`` of them belong to different vectors.
    """
    from fastrot.kernels import gpu_axis
    from fastrot.kernels.gpu_matrix import parts_of

    backend, transpose = BACKENDS[arch], signs == "transposed"
    c = gpu_axis.axis_constants(factor, run, source, target, bool(signs), transpose, backend)
    wide = source == torch.float64
    x, part = SHORT[source], SHORT[parts_of(source, backend)[0]]
    types = {
        "x": f"*{x}",
        "out": f"*{SHORT[target]}",
        "signs": "*i8" if signs else f"*{x}",
        "h": f"*{part}" if factor.bases else f"*{x}",
        "scale_bits" if wide else "scale": "i64" if wide else "fp32",
    }
    if wide:
        trips, dot = c["SIZE"], Dot(c["A"], c["COLUMNS"], 1, c["SIZE"])
    else:
        trips = -(-c["SIZE"] // c["CHUNK"])
        dot = Dot(c["A"], c["COLUMNS"], c["CHUNK"], trips * c["PARTS"])
    narrowest = min(source.itemsize, target.itemsize)
    shape = f"{factor.size} in {c['A']}x{c['COLUMNS']}, run {run}"
    return Launch(
        name=title("axis", shape, source, target, signs),
        kernel=gpu_axis._axis64_kernel if wide else gpu_axis._axis_kernel,
        types=types,
        integers={
            "columns": ODD * run,
            "inner": run,
            "sign_stride": run // inner,
            "sign_run": inner,
        }
        | ({} if wide else {"tiles": ODD}),
        constants=c,
        arch=arch,
        elements=c["SIZE"] * c["COLUMNS"],
        width=source.itemsize + target.itemsize,
        dots=(dot,),
        trips=trips,
        resident=gpu_axis.config_of(factor, source, backend).resident,
        aligned=run * narrowest % 16 == 0,
        signed=bool(signs),
        gathers=bool(signs or factor.bases),
    )


def transform(
    n: int, dtype: torch.dtype, dim: int, arch: str, signs: str = ""
) -> tuple[Launch, ...]:
    """The passes of one transform along the last (-1) or the first (0) dimension.

    ``signs`` is empty, ``"signs"`` or ``"transposed"``.
    """
    from fastrot.kernels.gpu import _route

    route = _route(*factors(n), dim == -1, dtype, BACKENDS[arch])
    steps = [*route.passes, *[route.tile] * (route.tile is not None)]
    scratch = torch.float32 if dtype.itemsize == 2 else dtype
    made: list[Launch] = []
    inner = 1 if dim == -1 else COLUMNS
    run = n * inner
    for index, step in enumerate(steps):
        ends = [scratch if index else dtype, dtype if index == len(steps) - 1 else scratch]
        source, target = reversed(ends) if signs == "transposed" else ends
        word = signs if index == 0 else ""
        if index < len(route.passes):
            run //= step.size
            made.append(axis_launch(step, run, inner, source, target, arch, word))
        else:
            word = word if step.config.signs else ""
            made.append(rows_launch(step, source, target, arch, word))
    return tuple(reversed(made)) if signs == "transposed" else tuple(made)
