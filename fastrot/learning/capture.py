"""What a model's sites see, and how much its loss minds: the energy of its gradient there."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.lab.fisher import descend_from_own_words, only_activations
from fastrot.lab.outliers import CACHED, observed
from fastrot.lab.quantized import linears_of

Site = tuple[str, int]
"""Its name, as in :mod:`fastrot.lab.outliers`, and the number of the layer."""

QUANTILE = 0.99
"""Energies of vectors above this one count as it: few tokens would speak for all."""


@dataclass
class Captured:
    """Vectors and energies.

    Attributes:
        vectors: of a site, a sample: ``(tokens, width)``, or ``(tokens, heads, width)`` of what is
            cached; float32.
        energies: mean squared length of the gradient at a site, over tokens and heads.
        weights: of a linear module by name: the mean over outputs of gradient² · |input|².
    """

    vectors: dict[Site, Tensor] = field(default_factory=dict)
    energies: dict[Site, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


def capture(
    model: Any,
    windows: Tensor,
    sites: set[str],
    kept: int,
    seed: int,
    done: Callable[[int], Any] | None = None,
) -> Captured:
    """Run a model on windows of text, one after the other, forwards and backwards.

    Args:
        model: a causal language model in float32, on which hooks may stand meanwhile.
        windows: token ids, ``(n, length)``.
        sites: whose vectors are wanted.
        kept: vectors of a site, over all windows.
        seed: of the sample and of the targets.
        done: told how many tokens were seen after each window.
    """
    generator = torch.Generator().manual_seed(seed)
    each = min(windows.shape[1], -(-kept // len(windows)))
    vectors: dict[Site, list[Tensor]] = defaultdict(list)
    energies: dict[Site, list[Tensor]] = defaultdict(list)
    weights: dict[str, list[Tensor]] = defaultdict(list)
    chosen = torch.empty(0)

    def see(site: str, layer: int, x: Tensor) -> None:
        if site not in sites:
            return
        seen = x.detach()
        # Some layers have flattened their tokens.
        seen = seen.transpose(1, 2)[0] if site in CACHED else seen.flatten(0, -2)
        vectors[site, layer].append(seen[chosen].float().cpu())

        def note(gradient: Tensor) -> None:
            energies[site, layer].append(gradient.float().square().sum(-1).flatten().cpu())

        x.register_hook(note)

    def mind(name: str, energy: Tensor) -> None:
        weights[name].append(energy)

    with only_activations(model), observed(model, see), _weighed(model, mind):
        for window in windows.split(1):
            chosen = torch.randperm(window.shape[1], generator=generator)[:each]
            descend_from_own_words(model, window, generator)
            if done is not None:
                done(window.numel())
    return Captured(
        {site: torch.cat(found) for site, found in vectors.items()},
        {site: _robust_mean(torch.cat(found)) for site, found in energies.items()},
        {name: float(torch.stack(found).mean()) for name, found in weights.items()},
    )


def _robust_mean(energies: Tensor) -> float:
    most = energies.kthvalue(max(1, int(QUANTILE * len(energies)))).values
    return float(energies.clamp(max=float(most)).mean())


@contextmanager
def _weighed(model: Any, mind: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Tell of every linear module in the layers how much the loss minds noise on its weight."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            lengths = args[0].detach().float().square().sum(-1)

            def note(gradient: Tensor) -> None:
                energy = gradient.float().square().mean(-1) * lengths
                mind(name, energy.mean().cpu())

            output.register_hook(note)

        return after

    with ExitStack() as stack:
        for name, module in linears_of(model).items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield
