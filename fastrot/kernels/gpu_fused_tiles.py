"""How a fused kernel cuts tokens into tiles, and with which configuration it is launched."""

import functools
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch

from fastrot.hadamard import factors
from fastrot.kernels.gpu_fused import ACTIVATIONS, PLAIN, RMSNORM
from fastrot.kernels.gpu_tiles import Config, config_for, product, sizes


class Prologue(NamedTuple):
    """What happens to x before the transform; see :mod:`fastrot.kernels.fused`."""

    activation: str | None = None
    eps: float | None = None
    gamma: bool = False

    @property
    def kind(self) -> int:
        """The kernel's number for it."""
        if self.activation is not None:
            return ACTIVATIONS[self.activation]
        return RMSNORM.value if self.norm else PLAIN.value

    @property
    def norm(self) -> bool:
        """Whether the norms of tokens are needed."""
        return self.eps is not None

    @property
    def exact(self) -> bool:
        """Whether the transform sees x as it is in memory; else float32, of twice the registers."""
        return self.activation is None and not self.gamma


class Cut(NamedTuple):
    """What decides how tokens are cut."""

    n: int
    block: int
    group: int
    """Elements that share a scale, 0 for a token."""
    parts: int
    """Of the input of the first product."""
    prologue: Prologue
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
        return self.A > 128 and self.a > 1 and not self.config.rows

    @property
    def resident(self) -> int:
        """Programs of a persistent launch on each multiprocessor, 0 for one per tile."""
        return 0 if self.chunked else self.config.resident


class Form(NamedTuple):
    """What a configuration is tuned for: a padded tile, and whether there are two products.

    Their input is ``exact`` or not (None: either), as in :class:`Prologue`.
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
    Form(128, 128, two=True): Config(8, 0, 1, 3, columns=64),
    Form(128, 128, two=False): Config(8, 0, 1, 3),
    Form(192, 64, two=True, exact=True): Config(4, 0, 1, 2, rows=64),
    Form(256, 64, two=True, exact=True): Config(8, 0, 1, 2, rows=128),
    Form(256, 64, two=True, exact=False): Config(8, 0, 1, 1, rows=128),
    Form(256, 16, two=False, exact=True): Config(4, 0, 8, 3),
    Form(256, 32, two=False, exact=True): Config(4, 0, 4, 3),
    Form(256, 64, two=False, exact=True): Config(8, 0, 1, 3),
}
"""For 16 bits on Hopper: what `benchmarks/tune_fused.py` found fastest on an H200, or what is like
it; tiles in pieces are chosen by their machine code, as the plain kernel's were found fastest.
Elsewhere the configurations of :mod:`fastrot.kernels.gpu_tiles` hold.
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
                for A, B in dict.fromkeys(sizes(rows, columns)):
                    tuned = _tuned(A, B, a, cut, bool(right[0]))
                    config = tuned or _config(A, B, a, cut)
                    if config is None or (cut.group and columns % cut.group):
                        continue
                    tile = FusedTile(*left, *right, columns, rows, A // rows, A, B, config)
                    found.append((_cost(tile, cut, tuned is not None), tile))
    return found[::-1]  # of equals the last


def _cost(tile: FusedTile, cut: Cut, tuned: bool) -> float:
    """Arithmetic for an element, and what else has been seen to take time."""
    A, B, two = tile.A, tile.B, tile.a > 1
    right = B if tile.right_bases else tile.config.columns or B
    cost = float((A * cut.parts if two else 0) + right * (2 if two else cut.parts))
    cost += max(A, B) / 16  # of equals the squarest
    cost *= A * B / (tile.tokens * tile.token_rows * tile.columns)
    cost *= 1.0 if tile.columns % 8 == 0 else 1.5  # narrow accesses
    cost *= 1.0 if A * B >= 4096 else 3.0  # too little to load at a time
    if A > 128 and two:  # many blocks of left matrix, or loaded for every tile
        cost *= 1.3 if tile.config.rows else 1.5
    cost *= 1.0 if tuned else 1.1  # of equals the measured
    if tuned and cut.prologue.norm and tile.tokens > 1 and tile.token_rows > 1:
        cost *= 1.5  # compares every row's token to every other's
    return cost


def _tuned(A: int, B: int, a: int, cut: Cut, table: bool) -> Config | None:
    if cut.backend not in ("hopper", "interpreter") or cut.source == torch.float32:
        return None
    before, exact = cut.prologue, cut.prologue.exact
    form = Form(A, B, a > 1, exact)
    config = TUNED.get(form, TUNED.get(form._replace(exact=None)))
    if config is None:
        return None
    if table or cut.group > (config.columns or B):
        config = config._replace(columns=0)
    beside = cut.signs or before.gamma
    # What is read beside x, or summed up, takes registers; where there are none left, and the
    # error function in large pieces, other tiles and configurations do not spill.
    whole = not (config.rows or config.columns)
    if whole and form.two and not exact and A * B > 4096 and (beside or before.norm):
        return None
    if config.rows == 64 and (beside or before.norm):
        return None
    if config.rows and before.activation == "gelu":
        return None
    if beside:  # a prefetch of it takes as much room as that of x
        fewer = config.resident - config.resident // 4
        stages = min(config.num_stages, 1 if config.rows else 2)
        return config._replace(resident=fewer, num_stages=stages)
    return config


def _config(A: int, B: int, a: int, cut: Cut) -> Config | None:
    if A & (A - 1) or B & (B - 1) or max(A, B) > 256:
        return None
    # Without a left matrix, a tile of many rows is like one of few.
    rows = min(A, 128) if a == 1 else A
    # Hopper and Blackwell hold results of products elsewhere than operands.
    wide = not cut.prologue.exact and cut.backend in ("ampere", "cdna")
    source = torch.float32 if wide else cut.source
    config = config_for(rows, A * B // rows if a == 1 else B, source, source, cut.backend)
    if config is None or cut.prologue.exact or config.num_warps < 8:
        return config
    return config._replace(resident=min(config.resident, 1))
