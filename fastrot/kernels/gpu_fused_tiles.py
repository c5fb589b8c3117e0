"""How a fused kernel cuts tokens into tiles, and with which configuration it is launched."""

import functools
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch

from fastrot.hadamard import factors
from fastrot.kernels.gpu_matrix import padded
from fastrot.kernels.gpu_tiles import Config, config_for, product


class Cut(NamedTuple):
    """What decides how tokens are cut."""

    n: int
    block: int
    group: int
    """Elements that share a scale, 0 for a token."""
    parts: int
    """Of the input of the first product."""
    exact: bool
    """Whether that is x as it is in memory; else float32, which takes twice the registers."""
    norm: bool
    """Whether the norms of tokens are needed, too; then what is not exact reads gamma."""
    signs: bool
    source: torch.dtype
    backend: str


@dataclass(frozen=True)
class FusedTile:
    """``tokens`` of ``token_rows × columns`` elements in ``(A, B)``; blocks are H_a ⊗ H_b."""

    left_bases: tuple[int, ...]
    left_power: int
    right_bases: tuple[int, ...]
    right_power: int
    columns: int
    token_rows: int
    tokens: int
    A: int
    B: int
    config: Config

    @property
    def a(self) -> int:
        """The order of the left factor."""
        return product(self.left_bases, self.left_power)

    @property
    def b(self) -> int:
        """The order of the right factor."""
        return product(self.right_bases, self.right_power)

    @property
    def chunked(self) -> bool:
        """Whether the left matrix is loaded in parts, for every tile, and not kept."""
        return self.A > 128 and self.a > 1

    @property
    def resident(self) -> int:
        """Programs of a persistent launch on each multiprocessor, 0 for one per tile."""
        return 0 if self.chunked else self.config.resident


class Form(NamedTuple):
    """What a configuration is tuned for: a padded tile, and whether there are two products.

    Their input is ``exact`` or not (None: either), as in :class:`Cut`.
    """

    A: int
    B: int
    two: bool
    exact: bool | None = None


TUNED = {
    Form(64, 64, two=True, exact=True): Config(4, 0, 4, 3),
    Form(64, 64, two=True, exact=False): Config(4, 0, 3, 3),
    Form(64, 128, two=True): Config(4, 0, 2, 3),
    Form(64, 128, two=False): Config(4, 0, 2, 3),
    Form(128, 32, two=False, exact=True): Config(4, 0, 7, 3),
    Form(128, 64, two=True, exact=True): Config(4, 0, 2, 3),
    Form(128, 128, two=True): Config(8, 0, 1, 3),
    Form(128, 128, two=False): Config(8, 0, 1, 3),
    Form(256, 16, two=False, exact=True): Config(4, 0, 8, 3),
    Form(256, 32, two=False, exact=True): Config(4, 0, 4, 3),
    Form(256, 64, two=False, exact=True): Config(8, 0, 1, 3),
}
"""For 16 bits on Hopper: what `benchmarks/tune_fused.py` found fastest on an H200, or what is like
it. Elsewhere the configurations of :mod:`fastrot.kernels.gpu_tiles` hold.
"""


@functools.lru_cache(maxsize=1024)
def fused_tile(cut: Cut) -> FusedTile | None:
    """The cut with the least arithmetic for which there is a configuration, None without any."""
    return min(fused_tiles(cut), key=itemgetter(0), default=(0.0, None))[1]


def fused_tiles(cut: Cut) -> list[tuple[float, FusedTile]]:
    """Every cut for which there is a configuration, and its cost."""
    if cut.group & (cut.group - 1):
        return []  # Triton's tiles have powers of two
    bases, power = factors(cut.block)
    vectors = cut.n // cut.block
    found: list[tuple[float, FusedTile]] = []
    for first in range(len(bases) + 1):
        for bit in range(power.bit_length() if first == len(bases) else 1):
            right = bases[first:], power >> bit
            left = bases[:first], power // right[1]
            a, b = product(*left), product(*right)
            most = vectors if a == 1 else 1
            for packed in (p for p in range(1, most + 1) if most % p == 0 and p * b <= 256):
                columns, rows = packed * b, vectors * a // packed
                B, A = padded(columns), max(64, padded(rows))
                if B > 256 or A > 256 or (cut.group and columns % cut.group):
                    continue
                tuned = _tuned(A, B, a, cut)
                config = tuned or _config(A, B, a, cut)
                if config is None:
                    continue
                tokens = A // rows
                cost = float((A * cut.parts if a > 1 else 0) + B * (2 if a > 1 else cut.parts))
                cost += max(A, B) / 16  # of equals the squarest
                cost *= A * B / (tokens * rows * columns)
                cost *= 1.0 if columns % 8 == 0 else 1.5  # narrow accesses
                cost *= 1.0 if A * B >= 4096 else 3.0  # too little to load at a time
                cost *= 1.5 if A > 128 and a > 1 else 1.0  # loads its left matrix for every tile
                cost *= 1.0 if tuned else 1.1  # of equals the measured
                if tuned and cut.norm and tokens > 1 and rows > 1:
                    cost *= 1.5  # compares every row's token to every other's
                tile = FusedTile(*left, *right, columns, rows, tokens, A, B, config)
                found.append((cost, tile))
    return found[::-1]  # of equals the last


def _tuned(A: int, B: int, a: int, cut: Cut) -> Config | None:
    if cut.backend not in ("hopper", "interpreter") or cut.source == torch.float32:
        return None
    if a > 1 and A * B > 4096 and cut.norm and not cut.exact:
        return None  # a prefetched gamma leaves too few registers
    form = Form(A, B, a > 1, cut.exact)
    config = TUNED.get(form, TUNED.get(form._replace(exact=None)))
    if config and (cut.signs or (cut.norm and not cut.exact)):
        # A prefetch of these takes as much room as that of x.
        if form.two and not cut.exact and A * B > 4096:
            return None  # nor are there registers left
        fewer = config.resident - config.resident // 4
        return config._replace(resident=fewer, num_stages=2)
    return config


def _config(A: int, B: int, a: int, cut: Cut) -> Config | None:
    # Without a left matrix, a tile of many rows is like one of few.
    rows = min(A, 128) if a == 1 else A
    # Hopper and Blackwell hold results of products elsewhere than operands.
    wide = not cut.exact and cut.backend in ("ampere", "cdna")
    source = torch.float32 if wide else cut.source
    config = config_for(rows, A * B // rows if a == 1 else B, source, source, cut.backend)
    if config is None or cut.exact or config.num_warps < 8:
        return config
    return config._replace(resident=min(config.resident, 1))
