"""How the rows kernel cuts a vector into a tile, and with which configuration it is launched."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from fastrot.kernels.gpu_matrix import padded, parts_of


class Config(NamedTuple):
    """A launch: ``block`` columns at a time (0: all), programs per multiprocessor (0: no loop)."""

    num_warps: int
    block: int
    resident: int
    num_stages: int = 2


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


TUNED: dict[tuple[str, int], dict[tuple[bool, int, int], Config | None]] = {
    ("hopper", 16): {
        (True, 64, 128): Config(8, 0, 1, 4),
        (False, 64, 64): Config(4, 0, 4, 3),
        (False, 64, 128): Config(8, 0, 1, 3),
        (False, 128, 64): Config(8, 0, 2, 3),
        (False, 256, 64): Config(8, 0, 1, 2),
        (False, 128, 128): Config(8, 0, 1, 3),
        (False, 128, 256): Config(8, 64, 1, 3),
    },
    ("hopper", 32): {
        (False, 64, 64): Config(4, 0, 3, 3),
        (False, 128, 64): Config(8, 0, 1, 4),
        (False, 128, 128): Config(8, 64, 1, 3),
        (False, 128, 256): None,
        (False, 64, 256): None,
    },
}
"""What `benchmarks/tune.py` found fastest on an H200, by backend and bits, and by whether there is
no left factor, A and B; 64 x 128 is a guess from its neighbours. Where nothing was measured, the
configurations above hold. None: two passes are faster, or one adds up too many parts for four ulp.
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
    tuned = TUNED.get((backend, 32 if torch.float32 in (source, target) else 16), {})
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
            B = padded(width)
            # Without a left factor any number of vectors makes a tile.
            tall = next((A for alone, A, of in tuned if alone and of == B), 64)
            A = tall if a == 1 else max(64, padded(a))
            copies = A // a
            config = tuned.get((a == 1, A, B), config_for(A, B, source, target, backend))
            if A > 256 or B > 256 or config is None:
                continue
            cost = float((A * parts if a > 1 else 0) + B * max(1 if a == 1 else 2, parts))
            cost += max(A, B) / 16  # of equals the squarest
            cost *= A * B / (copies * a * width)
            cost *= 1.0 if width % 8 == 0 else 1.5  # narrow accesses
            cost *= 1.0 if A * B >= 4096 else 3.0  # too little to load at a time
            cost *= 1.0 if A <= 128 or a == 1 else 1.5  # loads its left matrix for every tile
            if best is None or cost <= best.cost:
                best = Tile(*left, *right, copies, packed, A, B, config, cost)
    return best
