"""What a checkpoint's record asks of a server, by transformers' names. Nothing here needs vLLM."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fastrot.edits import OnlineSite
from fastrot.integrations.marks import unmark
from fastrot.integrations.outlines import model_of
from fastrot.online.parallel import check_width
from fastrot.record import online_sites

DELEGATED = ("compressed-tensors",)
"""Quantization methods of other tools before which a rotation can stand."""

SPLIT_LOCATIONS = ("input", "down_input")
"""Where tensor parallelism leaves a rank a part of the vectors; attention has whole heads."""


def recorded_sites(config: Any) -> list[OnlineSite]:
    """The online rotations that the record in a model's configuration asks for."""
    plain = copy.deepcopy(config)
    unmark(plain)
    return online_sites(model_of(plain))


def check_ranks(sites: Iterable[OnlineSite], ranks: int) -> None:
    """Refuse tensor parallelism that would cut a block of a rotation in two.

    Args:
        sites: the online rotations of a model.
        ranks: on how many it is split.

    Raises:
        RotationError: names the first site, and block sizes that work.
    """
    for site in sites:
        # Where the ranks do not divide the size, the server refuses by itself.
        if site.location in SPLIT_LOCATIONS and site.rotation.size % ranks == 0:
            on_rank(site, site.rotation.size // ranks)


def on_rank(site: OnlineSite, width: int) -> OnlineSite:
    """The site as a rank sees it that has ``width`` entries of every vector.

    Raises:
        RotationError: the rank would have a part of a block; names block sizes that work.
    """
    rotation = site.rotation
    check_width(site.module, site.group, rotation, width)
    return replace(site, rotation=replace(rotation, size=width, block_size=rotation.block))
