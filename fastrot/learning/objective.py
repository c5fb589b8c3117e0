"""What a rotation costs under a scheme: predicted nats, smooth in the rotation.

Rounding a vector to levels ``Δ`` apart adds noise of variance ``Δ²/12`` to each of its entries,
which costs half of it times the energy of the gradient there. ``Δ`` is the range of the vector over
the number of levels; in the place of the range, which is not smooth, stands the 8-norm, of all
stand-ins that were tried the one that left the least loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrot.lab.schemes import Numbers
from fastrot.learning.capture import Sample

POWER = 8
ROWS = 512
"""Of a weight in one step, at most."""


def spread(x: Tensor, numbers: Numbers) -> Tensor:
    """The mean squared distance of levels over 12 of each vector, along the last dimension."""
    if numbers.group:
        x = x.unflatten(-1, (-1, numbers.group))
    levels = {"int": numbers.bits or 0, "fp8": 8}.get(numbers.format, 4)
    half = 2 ** (levels - 1) - 1
    steps = half if numbers.symmetric else (2**levels - 1) / 2
    squared = x.abs().pow(POWER).sum(-1).pow(2 / POWER)
    return (squared.mean(-1) if numbers.group else squared) / (12 * steps**2)


@dataclass(frozen=True)
class Vectors:
    """The vectors of one site.

    Attributes:
        sample: of them.
        numbers: how they are rounded.
    """

    sample: Sample
    numbers: Numbers

    def cost(self, q: Tensor, generator: torch.Generator, count: int) -> Tensor:
        """Of some, more likely those that count much; every block turned by ``q``."""
        roots = self.sample.shares.sqrt()
        chosen = torch.multinomial(roots, count, replacement=True, generator=generator)
        spreads = spread(turned(self.sample.vectors[chosen], q), self.numbers)
        return roots.sum() / 2 * (roots[chosen] * spreads).mean()


@dataclass(frozen=True)
class Weight:
    """A weight, ``(outputs, inputs)``, of which the rotation turns inputs or outputs.

    Attributes:
        matrix: float32 or the dtype of the model.
        weight: nats per unit of :func:`spread`.
        numbers: how its rows are rounded.
        outputs: whether the outputs are turned.
    """

    matrix: Tensor
    weight: float
    numbers: Numbers
    outputs: bool

    def cost(self, q: Tensor, generator: torch.Generator, count: int) -> Tensor:
        """Of some of its rows or, where these mix, columns."""
        matrix = self.matrix.T if self.outputs else self.matrix
        group = self.numbers.group or 1
        if self.outputs:  # whole groups of inputs are taken
            blocks = matrix.unflatten(0, (-1, group))
            chosen = _some(len(blocks), -(-ROWS // group), generator)
            part = turned(blocks[chosen].flatten(0, 1).float(), q).T
            # The 8-norm grows with the number of inputs.
            whole = 1.0 if self.numbers.group else (len(matrix) / part.shape[1]) ** (2 / POWER)
            return self.weight * whole * spread(part, self.numbers).mean()
        rows = matrix[_some(len(matrix), ROWS, generator)].float()
        return self.weight * spread(turned(rows, q), self.numbers).mean()


Term = Vectors | Weight


def turned(x: Tensor, q: Tensor) -> Tensor:
    """``x`` with every block along its last dimension multiplied by ``q``."""
    return (x.unflatten(-1, (-1, len(q))) @ q).flatten(-2)


def _some(length: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(length, generator=generator)[:most]


def total(
    terms: Sequence[Term], count: int, taken: int, generator: torch.Generator
) -> Callable[[Sequence[Tensor]], Tensor]:
    """The cost of all terms, estimated in every call from some of them.

    Args:
        terms: of one rotation.
        count: vectors of a site.
        taken: terms of a call.
        generator: of the choices.
    """

    def loss(matrices: Sequence[Tensor]) -> Tensor:
        (q,) = matrices
        chosen = _some(len(terms), taken, generator).tolist()
        costs = [terms[number].cost(q, generator, count) for number in chosen]
        return torch.stack(costs).sum() * (len(terms) / len(chosen))

    return loss
