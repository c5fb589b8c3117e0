"""Channels in an order by which every block of R4 holds as much as any other.

After a Hadamard matrix over ``b`` channels no entry is larger than their 1-norm over ``√b``, so the
block that holds most decides what stands out in the end. PeRQ (arXiv 2601.22347) deals the
channels out so that the expected 1-norms are alike, and folds their order into the weights.
"""

from dataclasses import replace
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from fastrot.api import plan
from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.lab.outliers import observed
from fastrot.lab.quantized import decoder_layers, layer_of
from fastrot.recipe import Recipe
from fastrot.rotations import Rotation


def balanced(mass: Tensor, block: int) -> Tensor:
    """An order of channels, ``(n,)`` int64, whose blocks have nearly equal sums.

    The heaviest channel that is left goes to the lightest block that has room, as jobs do to
    machines in Graham's rule (1969).

    Args:
        mass: of every channel, ``(n,)``, not negative.
        block: channels in a block; divides ``n``.
    """
    places: list[list[int]] = [[] for _ in range(len(mass) // block)]
    lightest = [(0.0, number) for number in range(len(places))]
    for channel in mass.argsort(descending=True, stable=True).tolist():
        held, number = heappop(lightest)
        places[number].append(channel)
        if len(places[number]) < block:
            heappush(lightest, (held + float(mass[channel]), number))
    return torch.tensor([channel for place in places for channel in place])


def check_permutable(model: Any, recipe: Recipe) -> None:
    """Whether the order of a model's channels can change, and would change anything.

    Raises:
        RotationError: the recipe has no R4, or one block of it, or an order already.
        UnsupportedRotationError: see :func:`fastrot.middle.middle_places`.
    """
    if recipe.permutations:
        raise RotationError("permute=True: the recipe has permutations already; leave one out")
    turns = [site.rotation for site in plan(model, recipe).online if site.group == "R4"]
    if not turns:
        raise RotationError("permute=True is of R4, which the recipe does not have; name R4")
    if turns[0].block == turns[0].size:
        raise RotationError(
            f"permute=True: R4 ({turns[0]}) has one block, so the order of its channels changes "
            "nothing; give it blocks, block_size={'R4': 32} for example"
        )
    order = Rotation.from_permutation(torch.arange(turns[0].size))
    plan(model, replace(recipe, permutations={"R4": (order,)}))


@torch.no_grad()
def orders_of(rotated: Any, done: Plan, windows: Tensor) -> list[Tensor]:
    """A balanced order for every layer, by the mean magnitudes of its channels on a text.

    Args:
        rotated: a model in float32, with R4 in blocks.
        done: the plan of that.
        windows: token ids, ``(n, length)``.
    """
    layers = decoder_layers(rotated)
    rotations = {
        layer: site.rotation
        for site in done.online
        if site.group == "R4" and (layer := layer_of(site.module, layers)) is not None
    }
    masses = {
        layer: torch.zeros(rotation.size, dtype=torch.float64)
        for layer, rotation in rotations.items()
    }

    def see(site: str, layer: int, x: Tensor) -> None:
        if site == "down" and layer in masses:
            before = rotations[layer].apply(x.float(), inverse=True)
            masses[layer] += before.abs().flatten(0, -2).sum(0).double().cpu()

    with observed(rotated, see):
        for window in windows.split(1):
            rotated(input_ids=window.to(rotated.device))
    as_they_are = torch.arange(next(iter(rotations.values())).size)
    return [
        balanced(masses[layer], rotations[layer].block) if layer in masses else as_they_are
        for layer in range(len(layers))
    ]
