"""What a model's sites see, and how much its loss minds: the energy of its gradient there."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrot.lab.fisher import Charged, descend_from_own_words, only_activations
from fastrot.lab.layerwise import layerwise
from fastrot.lab.outliers import CACHED, observed
from fastrot.lab.quantized import linears_of

Site = tuple[str, int]
"""Its name, as in :mod:`fastrot.lab.outliers`, and the number of the layer."""


class Sample(NamedTuple):
    """Of the vectors of a site, over all tokens and heads.

    Attributes:
        vectors: ``(n, width)``, float32.
        shares: ``(n,)``: a function of the vectors, summed with these, estimates without bias the
            mean over tokens of the sum over heads of that function times the squared length of the
            gradient.
    """

    vectors: Tensor
    shares: Tensor


@dataclass
class Captured:
    """What goes into the sites and the linear modules.

    Attributes:
        samples: by site.
        weights: of a linear module by name: the mean over outputs of gradient² · |input|².
    """

    samples: dict[Site, Sample] = field(default_factory=dict)
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
        kept: tokens of a site, over all windows, about: so many vectors for each head.
        seed: of the samples and of the targets.
        done: told how many tokens were seen after each window.
    """
    targets, choice = (generator_of(seed) for _ in range(2))
    count, length = windows.shape
    apart = -(-count // kept)
    looked_at = -(-count // apart)
    each = min(length, -(-kept // looked_at))
    found: dict[Site, list[Sample]] = defaultdict(list)
    weights: dict[str, float] = defaultdict(float)
    charged = Charged()
    asked: set[Site] = set()
    again: dict[Site, Tensor] = {}

    def see(site: str, layer: int, x: Tensor) -> None:
        if not showing or site not in sites or charged.before(site, layer, x):
            return
        place = site, layer
        if place in asked:  # the layer runs again, on the way back
            again[place] = x.detach()
            return
        asked.add(place)

        def note(gradient: Tensor) -> None:
            seen = again.pop(place)
            heads = seen.shape[1] if site in CACHED else 1
            energies = gradient.float().square().sum(-1).flatten().cpu()
            rows, shares = drawn(energies, each * heads, choice)
            vectors = seen.flatten(0, -2)[rows.to(seen.device)].float().cpu()
            found[place].append(Sample(vectors, shares / (looked_at * length)))

        x.register_hook(note)

    def mind(name: str, energy: float) -> None:
        weights[name] += energy / count

    with ExitStack() as stack:
        stack.enter_context(only_activations(model))
        stack.enter_context(layerwise(model))
        stack.enter_context(observed(model, see))
        stack.enter_context(_weighed(model, mind))
        for number, window in enumerate(windows.split(1)):
            showing = number % apart == 0
            asked.clear()
            descend_from_own_words(model, window, targets)
            if done is not None:
                done(window.numel())
    samples = {}
    for place in list(found):
        vectors, shares = zip(*found.pop(place), strict=True)
        samples[place] = Sample(torch.cat(vectors), torch.cat(shares))
    return Captured(samples, dict(weights))


def generator_of(seed: int) -> torch.Generator:
    """What draws samples for a seed of any size: by its last 64 bits, all that torch takes."""
    return torch.Generator().manual_seed(seed % 2**64)


def drawn(energies: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of the vectors with these energies, more likely those with much, and their shares.

    Priority sampling (Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary
    subset sums", J. ACM 54(6), 2007) by the root of the energy: the few tokens that all others look
    at, whose energy may be a thousand times the rest's, are never missed, and most of what is drawn
    are the others.

    Args:
        energies: ``(n,)``, float32.
        most: how many are drawn.
        generator: of the choice.

    Returns:
        Numbers of those drawn, and for each its energy over the probability that it is drawn.
    """
    roots = energies.sqrt()
    priorities = roots / (1 - torch.rand(len(roots), generator=generator, dtype=roots.dtype))
    rows = priorities.argsort(descending=True)
    threshold = priorities[rows[most]] if most < len(rows) else roots.new_zeros(())
    rows = rows[:most]
    return rows, roots[rows] * roots[rows].maximum(threshold)


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
