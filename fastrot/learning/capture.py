"""What a model's sites see, and how much its loss minds: one forward and one backward pass.

How much the loss minds noise at a place is the energy of its gradient there (the diagonal of the
Fisher information), with targets drawn from the model's own predictions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastrot.lab.outliers import HEADED, observed
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
        seen = seen.transpose(1, 2)[0] if site in HEADED else seen.flatten(0, -2)
        vectors[site, layer].append(seen[chosen].float().cpu())

        def note(gradient: Tensor) -> None:
            energies[site, layer].append(gradient.float().square().sum(-1).flatten().cpu())

        x.register_hook(note)

    def mind(name: str, energy: Tensor) -> None:
        weights[name].append(energy)

    with _only_activations(model), observed(model, see), _weighed(model, mind):
        for window in windows.split(1):
            chosen = torch.randperm(window.shape[1], generator=generator)[:each]
            with torch.enable_grad():
                logits = model(input_ids=window.to(model.device)).logits[0].float()
                drawn = torch.multinomial(
                    logits.detach().softmax(-1).cpu(), 1, generator=generator
                )[:, 0]
                cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
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
def _only_activations(model: Any) -> Iterator[None]:
    """Let gradients flow through the activations, and to no weight."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in asked:
            parameter.requires_grad_()


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
