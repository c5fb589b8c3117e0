"""What a model's sites see, and how much its loss minds: the energy of its gradient there."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.lab.fisher import Charged, descend_from_own_words, only_activations
from fastrot.lab.layerwise import layerwise
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

    Beside the model this takes the memory of what is kept, of the graph of one layer, of the inputs
    of all layers, and of the logits, each of one window.

    Args:
        model: a causal language model in float32, on which hooks may stand meanwhile.
        windows: token ids, ``(n, length)``.
        sites: whose vectors are wanted.
        kept: vectors of a site, over all windows, about.
        seed: of the sample and of the targets.
        done: told how many tokens were seen after each window.
    """
    generator = torch.Generator().manual_seed(seed)
    count, length = windows.shape
    apart = -(-count // kept)
    each = min(length, -(-kept // -(-count // apart)))
    vectors: dict[Site, Tensor] = {}
    energies: dict[Site, ClippedMean] = {}
    weights: dict[str, float] = defaultdict(float)
    chosen = torch.empty(0)
    rows = slice(0)

    charged = Charged()

    def see(site: str, layer: int, x: Tensor) -> None:
        if site not in sites or charged.before(site, layer, x):
            return
        seen = x.detach()
        # Some layers have flattened their tokens.
        seen = seen.transpose(1, 2)[0] if site in CACHED else seen.flatten(0, -2)
        if (site, layer) not in vectors:
            size = -(-count // apart) * each, *seen.shape[1:]
            vectors[site, layer] = torch.empty(size, dtype=torch.float32)
        vectors[site, layer][rows] = seen[chosen].float().cpu()

        def note(gradient: Tensor) -> None:
            energy = gradient.float().square().sum(-1).flatten().cpu()
            mean = energies.setdefault((site, layer), ClippedMean(count * len(energy)))
            mean.add(energy)

        x.register_hook(note)

    def mind(name: str, energy: float) -> None:
        weights[name] += energy / count

    with ExitStack() as stack:
        stack.enter_context(only_activations(model))
        stack.enter_context(layerwise(model))
        stack.enter_context(observed(model, see))
        stack.enter_context(_weighed(model, mind))
        for number, window in enumerate(windows.split(1)):
            chosen = torch.randperm(length, generator=generator)[: 0 if number % apart else each]
            at = -(-number // apart) * each
            rows = slice(at, at + len(chosen))
            descend_from_own_words(model, window, generator)
            if done is not None:
                done(window.numel())
    means = {site: found.result() for site, found in energies.items()}
    return Captured(vectors, means, dict(weights))


class ClippedMean:
    """The mean of numbers of which those above a quantile count as it; these alone are kept."""

    def __init__(self, count: int) -> None:
        """Of so many numbers."""
        self.count = count
        self.kept = count - max(1, int(QUANTILE * count)) + 1
        self.largest, self.rest = torch.empty(0, dtype=torch.float32), 0.0

    def add(self, numbers: Tensor) -> None:
        """Take some in, ``(n,)`` float32."""
        numbers = torch.cat([self.largest, numbers]).sort(descending=True).values
        self.largest = numbers[: self.kept].clone()
        self.rest += float(numbers[self.kept :].double().sum())

    def result(self) -> float:
        """The mean, when all are in."""
        return (self.rest + float(self.largest[-1]) * self.kept) / self.count


@contextmanager
def _weighed(model: Any, mind: Callable[[str, float], None]) -> Iterator[None]:
    """Tell of every linear module in the layers how much the loss minds noise on its weight."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            lengths = args[0].detach().float().square().sum(-1)

            def note(gradient: Tensor) -> None:
                energy = gradient.float().square().mean(-1) * lengths
                mind(name, float(energy.mean()))

            output.register_hook(note)

        return after

    with ExitStack() as stack:
        for name, module in linears_of(model).items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield
