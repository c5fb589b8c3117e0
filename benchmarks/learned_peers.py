"""What other projects learn rotations by, from their papers' descriptions, on the same text.

SpinQuant (Liu et al., arXiv 2405.16406): descent on the loss of the quantized model by the Cayley
SGD of Li et al. (arXiv 2002.01113), R1 and R2, with a learning rate that falls linearly. DartQuant
(Shao et al., arXiv 2511.04063): R1 and R2 that make the sum of exp(-|x|) small over captured
activations, a loss called Whip, with the orthogonal matrix as the Q of a QR factorisation whose
argument is free. Both begin at the Hadamard matrices that the recipe makes, get as many seconds as
`fastrot.learn` took, and are made exactly orthogonal at the end. Their rates are the best of some
on the embedded model (SpinQuant: its own 1.5, 0.15, 0.05, 0.015; Adam of DartQuant: 0.001, 0.01,
0.03).
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastrot
from fastrot.edits import Plan
from fastrot.lab.outliers import observed
from fastrot.lab.schemes import Scheme
from fastrot.learning.objective import turned
from fastrot.learning.orthogonal import polished
from fastrot.learning.refine import simulated
from fastrot.learning.terms import bases
from fastrot.rotations.stages import dense

LEARNED = ("R1", "R2")
SPINQUANT_RATE = 0.05
DARTQUANT_RATE = 1e-3
SEEN = 4096
"""Tokens that DartQuant's activations are of."""
Matrices = dict[str, list[Tensor]]
Peer = Callable[[Any, fastrot.Recipe, str, Tensor, float], Matrices]


def spinquant(
    base: Any, recipe: fastrot.Recipe, scheme: str, windows: Tensor, seconds: float
) -> Matrices:
    """Matrices for a scheme, learned from the loss of the quantized model on one window a step."""
    rotated, plan = _rotated(base, recipe)
    places = _places(plan, rotated)
    descent = [CayleySGD(rotation.block) for _, _, rotation in places]
    generator = torch.Generator().manual_seed(recipe.seed)
    began = time.perf_counter()
    with simulated(rotated, plan, Scheme.parse(scheme)) as loss:
        while (spent := (time.perf_counter() - began) / seconds) < 1:
            window = windows[torch.randint(len(windows), (1,), generator=generator)]
            leaves = [each.x.clone().requires_grad_() for each in descent]
            turns = {place[:2]: leaf for place, leaf in zip(places, leaves, strict=True)}
            for each, gradient in zip(
                descent, torch.autograd.grad(loss(turns, window), leaves), strict=True
            ):
                each.step(gradient, SPINQUANT_RATE * (1 - spent))
    return _behind(places, [each.x for each in descent])


class CayleySGD:
    """A matrix on the Stiefel manifold, with momentum; the Cayley transform by two iterations."""

    def __init__(self, size: int) -> None:
        self.x = torch.eye(size)
        self.momentum = torch.zeros(size, size)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Go down a gradient."""
        x = self.x
        momentum = 0.9 * self.momentum - gradient
        half = momentum @ x.T - 0.5 * x @ (x.T @ momentum @ x.T)
        skew = half - half.T
        self.momentum = skew @ x
        rate = min(rate, 1.0 / (float(skew.norm()) + 1e-8))
        y = x + rate * self.momentum
        for _ in range(2):
            y = x + rate / 2 * skew @ (x + y)
        self.x = y


def dartquant(
    base: Any, recipe: fastrot.Recipe, scheme: str, windows: Tensor, seconds: float
) -> Matrices:
    """Matrices learned from captured activations, whatever the scheme."""
    began = time.perf_counter()
    rotated, plan = _rotated(base, recipe)
    captured = _seen(rotated, windows, recipe.seed)
    places = _places(plan, rotated)
    left = seconds - (time.perf_counter() - began)
    found = []
    for name, layer, rotation in places:
        if name == "R1":
            own = [x for (site, _), x in captured.items() if site in ("attention", "mlp")]
        else:
            own = [captured["o", layer].unflatten(-1, (-1, rotation.block)).flatten(0, -2)]
        share = 0.6 if name == "R1" else 0.4 / (len(places) - 1)
        found.append(_whipped(torch.cat(own), rotation.block, left * share, recipe.seed))
    return _behind(places, found)


@torch.no_grad()
def _seen(model: Any, windows: Tensor, seed: int) -> dict[tuple[str, int], Tensor]:
    """What attention, output projection and MLP of every layer read, of tokens drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    each = -(-SEEN // len(windows))
    found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    chosen = torch.empty(0)

    def see(site: str, layer: int, x: Tensor) -> None:
        if site in ("attention", "mlp", "o"):
            found[site, layer].append(x[0, chosen])

    with observed(model, see):
        for window in windows.split(1):
            chosen = torch.randperm(window.shape[1], generator=generator)[:each]
            model(input_ids=window)
    return {place: torch.cat(parts) for place, parts in found.items()}


def _whipped(samples: Tensor, size: int, seconds: float, seed: int) -> Tensor:
    """The orthogonal matrix that leaves the fewest small entries."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.eye(size, requires_grad=True)
    adam = torch.optim.Adam([free], lr=DARTQUANT_RATE)
    began = time.perf_counter()
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        adam.param_groups[0]["lr"] = DARTQUANT_RATE * (1 - spent)
        chosen = samples[torch.randint(len(samples), (8192,), generator=generator)]
        loss = turned(chosen, _orthogonal(free)).abs().neg().exp().sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return _orthogonal(free).detach()


def _orthogonal(free: Tensor) -> Tensor:
    q, r = torch.linalg.qr(free)
    return q * r.diagonal().sign()


def _rotated(base: Any, recipe: fastrot.Recipe) -> tuple[Any, Plan]:
    rotated = copy.deepcopy(base).float()
    return rotated, fastrot.apply(rotated, recipe).plan


def _places(plan: Plan, model: Any) -> list[tuple[str, int | None, fastrot.Rotation]]:
    found = bases(plan, model)
    return [(name, layer, rotation) for name in LEARNED for layer, rotation in found[name].items()]


def _behind(
    places: Sequence[tuple[str, int | None, fastrot.Rotation]], turns: Sequence[Tensor]
) -> Matrices:
    """Behind the rotations of the recipe, made orthogonal to the last digit."""
    matrices: Matrices = {}
    for (name, _, rotation), turn in zip(places, turns, strict=True):
        exact = polished(polished(turn.double()))
        matrices.setdefault(name, []).append(polished(dense(rotation.stages()) @ exact))
    return matrices


PEERS: dict[str, Peer] = {"spinquant": spinquant, "dartquant": dartquant}
