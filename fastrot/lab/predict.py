"""What rounding costs at every place, predicted without rounding anything.

Of the Fisher information only the diagonal is taken, so noise at one place is taken to be
independent of that at others: of activations and weights that holds to a factor of two or so, while
the losses are small.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastrot.lab.fisher import Charged, descend_from_own_words, only_activations
from fastrot.lab.outliers import SITES, observed
from fastrot.lab.quantized import linears_of, naming
from fastrot.lab.quantizers import fake_quantize
from fastrot.lab.schemes import Numbers, Scheme

PLACES = (*SITES, "weights")
"""Where a scheme rounds."""


def predict(
    model: Any,
    windows: Tensor,
    schemes: Mapping[str, Scheme],
    seed: int = 0,
    done: Callable[[int], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Nats per token that every scheme is predicted to cost at every place, over all layers.

    Args:
        model: a causal language model in float32, rotated as it is to be.
        windows: token ids, ``(n, length)``.
        schemes: by name. Weights of those that use GPTQ are left out: it makes up for most of what
            rounding to nearest costs.
        seed: of the targets that the model draws.
        done: told how many tokens were seen after each window.

    Returns:
        By scheme, then by place, those of :data:`PLACES` that the model has and the scheme rounds.
        Where attention and MLP read the same tensor, its noise counts under the first of them.

    Raises:
        RotationError: a group that does not fit; names the scheme and the place.
    """
    wanted: dict[str, dict[Numbers, str]] = defaultdict(dict)
    for name, scheme in schemes.items():
        for place in PLACES:
            if numbers := _predictable(scheme, place):
                wanted[place].setdefault(numbers, name)
    costs: dict[tuple[str, Numbers], float] = defaultdict(float)

    def charge(place: str, output: Tensor, numbers: Numbers, error: Tensor) -> None:
        def note(gradient: Tensor) -> None:
            costs[place, numbers] += float((gradient.float() * error).square().sum()) / 2

        output.register_hook(note)

    charged = Charged()

    def see(site: str, layer: int, x: Tensor) -> None:
        if charged.before(site, layer, x):
            return
        for numbers, name in wanted[site].items():
            with naming(f"scheme {name}, {site} of layer {layer}"):
                error = fake_quantize(x.detach(), numbers) - x.detach()
            charge(site, x, numbers, error)

    with ExitStack() as stack:
        stack.enter_context(only_activations(model))
        stack.enter_context(observed(model, see))
        for name, module in linears_of(model).items() if wanted["weights"] else ():
            rounding = _rounding(name, wanted["weights"], charge)
            stack.callback(module.register_forward_hook(rounding).remove)
        generator = torch.Generator().manual_seed(seed)
        for window in windows.split(1):
            descend_from_own_words(model, window, generator)
            if done is not None:
                done(window.numel())
    return {
        name: {
            place: costs[place, numbers] / windows.numel()
            for place in PLACES
            if (numbers := _predictable(scheme, place)) and (place, numbers) in costs
        }
        for name, scheme in schemes.items()
    }


def _predictable(scheme: Scheme, place: str) -> Numbers | None:
    numbers = scheme.at(place)
    return None if numbers is None or numbers.gptq else numbers


def _rounding(
    name: str, wanted: Mapping[Numbers, str], charge: Callable[[str, Tensor, Numbers, Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """What rounded weights would add to the output of a linear module."""

    def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight.detach()
        weight = weight if isinstance(module, nn.Linear) else weight.T
        for numbers, scheme in wanted.items():
            with naming(f"scheme {scheme}, {name}.weight"):
                error = fake_quantize(weight, numbers) - weight
            charge("weights", output, numbers, linear(args[0].detach(), error))

    return after
