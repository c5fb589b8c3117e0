"""The loss of the quantized model itself, as a function of its rotations.

SpinQuant (Liu et al., arXiv 2405.16406) learns from it. Here the model stays rotated as it is, and
what is rounded is turned just before and, where nothing else turns with it, back again just after:
the same numbers as in a model whose rotation is turned, at the price of small products, and for
every architecture. Gradients go straight through the rounding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from fastrot.edits import Plan
from fastrot.edits.steps import Part
from fastrot.lab.cache import watched
from fastrot.lab.layerwise import layerwise
from fastrot.lab.outliers import cached_sites
from fastrot.lab.quantized import linears_of
from fastrot.lab.quantizers import fake_quantize
from fastrot.lab.schemes import Numbers, Scheme
from fastrot.learning.objective import turned
from fastrot.learning.terms import SITES, Place, turns_of

Turns = Mapping[Place, Tensor]
"""Orthogonal matrices, by the rotation that each comes behind; one that is missing is the
identity."""

Slot = tuple[Place, Part | None]
"""A turn of vectors, or of a part of them."""


@contextmanager
def simulated(
    model: Any, plan: Plan, scheme: Scheme
) -> Iterator[Callable[[Turns, Tensor], Tensor]]:
    """The mean loss of a quantized model on a text, of turns of its rotations.

    Weights that GPTQ will round stay as they are: it follows what was learned for the others.

    Args:
        model: rotated by the plan; hooks stand on it as long as the context lasts.
        plan: what was done.
        scheme: what is rounded.

    Yields:
        A function of the turns and of token ids, ``(n, length)``.
    """
    turns: dict[Place, Tensor] = {}
    weights: dict[str, Tensor] = {}
    inputs: dict[str, list[Slot]] = defaultdict(list)
    outputs: dict[str, list[Slot]] = defaultdict(list)
    for turn in turns_of(model, plan):
        (outputs if turn.outputs else inputs)[turn.name].append((turn.place, turn.part))
    cached = [
        [name for name, sites in SITES.items() if site in sites] for site in cached_sites(model)
    ]
    linears = linears_of(model)
    matrices: dict[str, Any] = {name: module.weight for name, module in linears.items()}
    numbers = scheme.weights if scheme.weights and not scheme.weights.gptq else None

    def rounded() -> Iterator[tuple[str, Tensor]]:
        for name, module in linears.items():
            plain = isinstance(module, nn.Linear)
            weight = matrices[name].detach()
            weight = _turned(weight if plain else weight.T, turns, inputs[name])
            if numbers is not None:
                weight = _turned(weight.T, turns, outputs[name]).T
                weight = straight_through(weight, numbers)
                weight = _turned(weight.T, turns, outputs[name], back=True).T
            yield name, weight if plain else weight.T

    def round_input(slots: Sequence[Slot]) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = _turned(args[0], turns, slots)
            return straight_through(x, scheme.activations), *args[1:]

        return before

    def round_cache(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for names, x in zip(cached, (keys, values), strict=True):
            slots: list[Slot] = [((name, layer), None) for name in names]
            x = straight_through(_turned(x, turns, slots), scheme.kv)
            found.append(_turned(x, turns, slots, back=True))
        return found[0], found[1]

    def loss(given: Turns, text: Tensor) -> Tensor:
        turns.clear()
        turns.update(given)
        weights.clear()
        weights.update(rounded())
        text = text.to(model.device)
        logits = model(input_ids=text[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())

    with ExitStack() as stack:
        stack.enter_context(watched(model, round_cache, needed=scheme.kv is not None))
        stack.enter_context(layerwise(model))
        for name, module in linears.items():
            stack.callback(module.register_forward_pre_hook(round_input(inputs[name])).remove)
            parametrize.register_parametrization(module, "weight", _Of(weights, name), unsafe=True)
            stack.callback(parametrize.remove_parametrizations, module, "weight", False)
        yield loss


class _Of(nn.Module):
    """A weight as it was last made, also for a layer that runs again on the way back."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.weights, self.name = weights, name

    def forward(self, weight: Tensor) -> Tensor:
        return self.weights.get(self.name, weight)


def straight_through(x: Tensor, numbers: Numbers | None) -> Tensor:
    """Rounded numbers with the gradient of those that are not (arXiv 1308.3432)."""
    if numbers is None:
        return x
    return x + (fake_quantize(x.detach(), numbers) - x.detach())


def _turned(x: Tensor, turns: Turns, slots: Sequence[Slot], back: bool = False) -> Tensor:
    for place, part in slots:
        if place not in turns:
            continue
        q = turns[place].mT if back else turns[place]
        pieces = [(slice(None), True)] if part is None else part.pieces(x.shape[-1])
        x = torch.cat([turned(x[..., at], q) if own else x[..., at] for at, own in pieces], -1)
    return x
