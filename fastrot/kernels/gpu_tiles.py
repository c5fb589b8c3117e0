"""How the rows kernel cuts a vector into a tile, and with which configuration it is launched."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from fastrot.kernels.gpu_matrix import padded, parts_of


class Config(NamedTuple):
    """A launch: ``block`` columns at a time (0: all), programs per multiprocessor (0: no loop).

    The pieces of a tile have ``rows`` and ``columns`` (0: all). Without ``signs`` there are no
    registers left for them: they take a pass of their own.
    """

    num_warps: int
    block: int
    resident: int
    num_stages: int = 2
    rows: int = 0
    columns: int = 0
    signs: bool = True


@dataclass(frozen=True)
class Tile:
    """How a vector is cut: H_n = H_a ⊗ H_b, ``(copies · a, b)`` padded to ``(A, B)``."""

    left_bases: tuple[int, ...]
    left_power: int
    right_bases: tuple[int, ...]
    right_power: int
    copies: int
    packed: int
    A: int
    B: int
    config: Config
    cost: float

    @property
    def chunked(self) -> bool:
        """Whether the left matrix is loaded in parts, for every tile, and not kept."""
        return self.A > 128 and not self.config.resident

    @property
    def resident(self) -> int:
        """Programs of a persistent launch on each multiprocessor, 0 for one program per tile."""
        return self.config.resident


def product(bases: tuple[int, ...], power: int) -> int:
    """The order of M₁ ⊗ M₂ ⊗ … ⊗ H_power."""
    for m in bases:
        power *= m
    return power


def _packed(n: int, width: int) -> int:
    """Number of vectors to lay side by side in a row; 8 elements load in 16 bytes."""
    counts = range(1, max(1, width // n) + 1)
    return max(counts, key=lambda c: (c * n % 8 == 0, c))


TRITON_SHARES_ACCUMULATORS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


SIZES = (4096, 8192, 16384, 32768)
"""Padded elements of a tile, up to which the configurations below hold."""

# Whole tiles up to 8192 elements, or 16384 of 16 bits from Hopper on, with a loop that keeps the
# matrices and prefetches; larger ones walk over blocks of columns, so that only the result is in
# registers as a whole. Before Hopper the matrices themselves occupy registers. Chosen so that
# nothing spills, with the bits of the wider of input and output as the second key;
# tests/test_triton_compile.py holds it to that.
CONFIGS = {
    ("hopper", 16): (Config(4, 0, 4), Config(8, 0, 2), Config(8, 0, 1), Config(8, 32, 0)),
    ("hopper", 32): (Config(4, 0, 3), Config(8, 0, 1), Config(8, 32, 0), Config(8, 32, 0)),
    ("ampere", 16): (Config(4, 0, 2), Config(8, 0, 1), Config(8, 32, 0), Config(8, 32, 0)),
    ("ampere", 32): (Config(4, 16, 0), Config(8, 16, 0), Config(8, 16, 0, 1)),
    ("cdna", 16): (Config(4, 0, 2), Config(8, 0, 1), Config(8, 32, 0), Config(8, 32, 0)),
    ("cdna", 32): (Config(4, 0, 2), Config(8, 32, 0), Config(8, 32, 0), Config(8, 32, 0)),
}


class Form(NamedTuple):
    """What a configuration is tuned for: a padded tile and its factors.

    These are tables or not (None: any); ``alone``, there is only the right one.
    """

    A: int
    B: int
    left: bool | None = None
    right: bool | None = None
    alone: bool = False


TUNED: dict[tuple[str, int], dict[Form, Config | None]] = {
    ("hopper", 16): {
        Form(64, 128, alone=True): Config(8, 0, 1, 4),
        Form(64, 64): Config(4, 0, 4, 3),
        Form(64, 96, right=True): Config(4, 0, 3, 3, columns=32),
        Form(64, 128): Config(8, 0, 1, 3),
        Form(64, 256, right=True): Config(4, 0, 1, 2, columns=64, signs=False),
        Form(128, 64): Config(8, 0, 2, 3),
        Form(128, 128, right=False): Config(8, 0, 1, 3, columns=64),
        Form(128, 256, left=False, right=False): Config(8, 0, 1, 3, columns=64, signs=False),
        Form(128, 256, left=True, right=False): Config(8, 0, 1, 2, columns=32, signs=False),
        Form(192, 64): Config(4, 0, 1, 3, rows=64),
        Form(192, 128, right=False): Config(4, 0, 1, 2, rows=64, signs=False),
        Form(256, 64): Config(8, 0, 1, 2),
    },
    ("hopper", 32): {
        Form(64, 64): Config(4, 0, 3, 3),
        Form(64, 96, right=True): Config(4, 0, 2, 3, columns=32),
        Form(64, 128, right=False): Config(4, 0, 2, 3, columns=32),
        Form(64, 192, right=True): Config(4, 0, 1, 2, columns=64),
        Form(64, 256): None,
        Form(128, 64): Config(8, 0, 1, 4),
        Form(128, 128, right=False): Config(8, 0, 1, 3, columns=64, signs=False),
        Form(128, 256): None,
    },
}
"""What was fastest on an H200, by backend and bits (`benchmarks/tune.py`, sweeps of the pieces);
64 x 128 of 16 bits is a guess from its neighbours. Where nothing was measured, the configurations
above hold. None: two passes are faster, or one adds up too many parts for four ulp.
"""


def config_for(
    A: int, B: int, source: torch.dtype, target: torch.dtype, backend: str
) -> Config | None:
    """The launch of an ``(A, B)`` tile, None if there is none."""
    # A left matrix of more than 128 rows is not kept; then the result of the first product is.
    if A > 128 and A * B > 16384:
        return None
    # Chained products share an accumulator in tensor memory, the largest fits only once, since 3.9.
    if backend == "blackwell" and A * B > 16384 and not TRITON_SHARES_ACCUMULATORS:
        return None
    family = "hopper" if backend in ("blackwell", "interpreter") else backend
    configs = CONFIGS[family, 32 if torch.float32 in (source, target) else 16]
    if A < B:  # a kept right matrix would be larger than the tile
        return configs[-1] if SIZES[len(configs) - 1] >= A * B else None
    fitting = (config for size, config in zip(SIZES, configs, strict=False) if size >= A * B)
    config = next(fitting, None)
    return config._replace(resident=0) if config and A > 128 else config


def tile_for(
    bases: tuple[int, ...], power: int, source: torch.dtype, target: torch.dtype, backend: str
) -> Tile | None:
    """The cut with the least arithmetic for which there is a configuration, None without any."""
    parts = parts_of(source, backend)[1]
    device = "hopper" if backend == "interpreter" else backend
    tuned = TUNED.get((device, 32 if torch.float32 in (source, target) else 16), {})
    best = None
    for first in range(len(bases) + 1):
        inside_power = first == len(bases)
        for bit in range(power.bit_length() if inside_power else 1):
            right_power = power >> bit if inside_power else power
            left = (bases[:first], power // right_power)
            right = (bases[first:], right_power)
            a, b = product(*left), product(*right)
            packed = _packed(b, 64) if a == 1 else 1
            width = packed * b
            for A, B in sizes(a, width):
                if A > 256 or B > 256:
                    continue
                form = Form(A, B, bool(left[0]), bool(right[0]), a == 1)
                configs = [tuned[like] for like in _likes(form) if like in tuned]
                if not configs and A & (A - 1) == B & (B - 1) == 0:
                    configs = [config_for(A, B, source, target, backend)]
                if not configs or configs[0] is None:
                    continue
                config = configs[0]
                copies = A // a
                columns = B if right[0] else config.columns or B
                cost = float((A * parts if a > 1 else 0) + columns * max(1 if a == 1 else 2, parts))
                if config.columns:
                    cost = max(cost, 128.0 * max(parts, 1.5))  # less is hidden behind memory
                cost += max(A, B) / 16  # of equals the squarest
                cost *= A * B / (copies * a * width)
                cost *= 1.0 if width % 8 == 0 else 1.5  # narrow accesses
                cost *= 1.0 if A * B >= 4096 else 3.0  # too little to load at a time
                if A > 128 and a > 1:  # many blocks of left matrix, or loaded for every tile
                    cost *= 1.3 if config.rows else 1.5
                if best is None or cost <= best.cost:
                    best = Tile(*left, *right, copies, packed, A, B, config, cost)
    return best


def _likes(form: Form) -> Iterator[Form]:
    """The form and those that cover it, the narrowest first."""
    for left, right in itertools.product((form.left, None), (form.right, None)):
        yield form._replace(left=left, right=right)


def sizes(a: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padded tiles of (a, width): in powers of two, and in the least pieces that may be tuned."""
    most, least = max(64, padded(a)), max(64, 64 * triton.cdiv(a, 64))
    return (most, padded(width)), (least, max(padded(width) // 2, 32 * triton.cdiv(width, 32)))
