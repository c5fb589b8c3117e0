"""The two descents: on what was captured, and on the loss of the quantized model itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.lab.schemes import Scheme
from fastrot.learning.capture import capture, generator_of
from fastrot.learning.kept import Kept
from fastrot.learning.objective import Term, total
from fastrot.learning.orthogonal import Walk, descend, polished
from fastrot.learning.refine import simulated
from fastrot.learning.terms import SITES, Place, bases, terms_of
from fastrot.rotations.stages import dense

RATES = {"R1": 0.005, "R2": 0.01, "R3": 0.01}
"""Radians that an entry turns in a step, at most."""
SHORTER = 5
"""R2 and R3 take so many times fewer steps: they are small, and there is one for each layer."""
VECTORS = 512
"""Of a site, in one step."""
TAKEN = 20
"""Terms of R1 in one step; there are several for each layer."""
KEPT_EVERY = 10
"""Steps of the second descent, each a run of the model, after which a file keeps it."""
STATE = ("q", "first", "second")
"""What a walk has, see :class:`~fastrot.learning.orthogonal.Walk`."""


def fitted(
    rotated: Any,
    plan: Plan,
    wanted: Sequence[str],
    scheme: Scheme,
    windows: Tensor,
    steps: int,
    vectors: int,
    bar: Any,
    kept: Kept,
) -> tuple[dict[str, list[Tensor]], list[float]]:
    """The learned matrices of a model that is rotated by a plan, and the history of R1.

    Raises:
        RotationError: none of them turns anything that is rounded.
    """
    rotations = {name: each for name, each in bases(plan, rotated).items() if name in wanted}
    counts = {name: steps if name == "R1" else -(-steps // SHORTER) for name in rotations}
    if not steps:
        windows = windows[:1]  # shows what they turn
    bar.reset(len(windows) + sum(counts[name] * len(each) for name, each in rotations.items()))
    bar.set_description("capture")
    terms: dict[Place, list[Term]] = {}
    if not all(kept.get(f"{name}.{layer}") for name, each in rotations.items() for layer in each):
        sites = {site for name in wanted for site in SITES[name]}
        captured = capture(rotated, windows, sites, vectors, plan.seed, lambda _: bar.update())
        terms = terms_of(rotated, plan, scheme, captured)
        with_terms = {name for name, _ in terms}
        rotations = {name: each for name, each in rotations.items() if name in with_terms}
    if not rotations:
        raise RotationError(
            f"{' and '.join(wanted)} of {type(rotated).__name__} turn nothing that {scheme} "
            "rounds; name R3 too, which turns the latents that it caches"
        )
    found: dict[str, list[Tensor]] = {}
    history: list[float] = []
    for name, each in rotations.items():
        bar.set_description(name)
        for layer, base in each.items():
            place = f"{name}.{layer}"
            known = kept.get(place)
            if known is None:
                mine = terms.get((name, layer), [])  # none where text does not reach
                generator = generator_of(plan.seed)
                walk = Walk(base.block, RATES[name], fixes_ones=base.fixes_ones)
                cost = total(mine, VECTORS, min(len(mine), TAKEN), generator)
                wished = counts[name] if mine else 0
                losses = descend([walk], cost, wished, lambda _: bar.update())
                known = {"q": walk.q, "losses": torch.tensor(losses, dtype=torch.float64)}
                kept.put(place, known)
            found.setdefault(name, []).append(polished(dense(base.stages()) @ known["q"]))
            history = known["losses"].tolist() if layer is None else history
    return found, history


def refined(
    learned: Any,
    plan: Plan,
    found: Mapping[str, Sequence[Tensor]],
    scheme: Scheme,
    windows: Tensor,
    steps: int,
    bar: Any,
    kept: Kept,
) -> tuple[dict[str, list[Tensor]], list[float]]:
    """Better matrices than a model was rotated with, by the loss of what is quantized."""
    rotations = {name: each for name, each in bases(plan, learned).items() if name in found}
    places = [(name, layer) for name, each in rotations.items() for layer in each]
    walks = [
        Walk(base.block, RATES[name], fixes_ones=base.fixes_ones)
        for name, each in rotations.items()
        for base in each.values()
    ]
    order = _shuffled(len(windows), steps, plan.seed)
    history: list[float] = []
    if known := kept.get("refined"):
        history = known["losses"].tolist()
        for number, walk in enumerate(walks):
            for name in STATE:
                setattr(walk, name, known[f"{number}.{name}"])
    bar.update(len(history))

    def done(losses: list[float]) -> None:
        bar.update()
        if len(losses) % KEPT_EVERY == 0:
            states = {f"{n}.{s}": getattr(walk, s) for n, walk in enumerate(walks) for s in STATE}
            kept.put("refined", states | {"losses": torch.tensor(losses, dtype=torch.float64)})

    with simulated(learned, plan, scheme) as loss:

        def on_next(turns: Sequence[Tensor]) -> Tensor:
            window = windows[order[len(history)], None]
            return loss(dict(zip(places, turns, strict=True)), window)

        descend(walks, on_next, steps, done, history)
    turns = iter(walks)
    better = {
        name: [polished(matrix @ next(turns).q) for matrix in each] for name, each in found.items()
    }
    return better, history


def _shuffled(count: int, wanted: int, seed: int) -> list[int]:
    """So many numbers below ``count``, all of them before one comes again."""
    generator = generator_of(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(rounds).tolist() if rounds else []
