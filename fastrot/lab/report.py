"""Which rotation is right for a model and a scheme: everything measured, and what follows."""

import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastrot.api import apply, plan
from fastrot.errors import RotationError
from fastrot.lab.evaluate import Difference, Losses, check_causal, compare, evaluate
from fastrot.lab.outliers import Outliers, magnitudes, observed, outliers
from fastrot.lab.predict import predict
from fastrot.lab.quantized import check_groups, naming, quantized
from fastrot.lab.schemes import Scheme
from fastrot.lab.sets import SCHEMES, SETS, in_order, rotations_of, without
from fastrot.mapping import ROTATIONS
from fastrot.version import __version__

log = logging.getLogger("fastrot")

LOOKED_AT = 4096
"""Tokens of which the statistics of outliers are made, at most."""
PREDICTED_FROM = 2048
"""Tokens from which the cost of every place is predicted, at most."""
FEWEST = 8
"""Windows: fewer say too little of their spread."""


@dataclass(frozen=True)
class Cell:
    """One scheme with one set of rotations.

    Attributes:
        scheme: its name; None in float32.
        rotations: name of the set.
        perplexity: per token.
        loss: mean, in nats; NaN if the model broke.
        added: over the model as it is, in float32, on the same windows.
    """

    scheme: str | None
    rotations: str
    perplexity: float
    loss: float
    added: Difference


@dataclass(frozen=True)
class Recommendation:
    """The set of rotations for a scheme.

    Attributes:
        scheme: its name.
        rotations: of the sets that are not clearly worse than the best, the one with the fewest
            rotations; clearly is more than two standard errors. None if no set has a finite loss.
        best: the set of least loss; None likewise.
        over: loss of every set over that of the recommended one.
    """

    scheme: str
    rotations: str | None
    best: str | None
    over: dict[str, Difference]


@dataclass(frozen=True)
class Surface:
    """Magnitudes ``(length, channels)`` at one site, with the first and the last set."""

    site: str
    layer: int
    magnitudes: dict[str, Tensor]


@dataclass(frozen=True)
class Report:
    """All measurements of a run, and what they depend on.

    ``predicted`` has nats per token by set of rotations, scheme and place.
    """

    model: str
    text: str
    command: str
    tokens: int
    windows: int
    seconds: float
    versions: dict[str, str]
    cells: tuple[Cell, ...]
    outliers: dict[str, dict[str, dict[int, Outliers]]]
    predicted: dict[str, dict[str, dict[str, float]]]
    recommendations: tuple[Recommendation, ...]
    surface: Surface

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, without the surface; what is not finite becomes None."""
        fields = {name: value for name, value in vars(self).items() if name != "surface"}
        fields["surface"] = {"site": self.surface.site, "layer": self.surface.layer}
        result: dict[str, Any] = _plain(fields)
        return result


def measure(
    load: Callable[[], Any],
    windows: Tensor,
    schemes: Sequence[str] = SCHEMES,
    sets: Sequence[str] | None = None,
    *,
    model: str,
    text: str,
    command: str,
    calibration: Tensor | None = None,
    progress: bool = False,
) -> Report:
    """Measure a model with every set of rotations and every scheme.

    Args:
        load: loads the model anew, unrotated, in float32; one is in memory at a time.
        windows: token ids, ``(n, context + 1)``, at least :data:`FEWEST`.
        schemes: names, see :meth:`fastrot.lab.schemes.Scheme.parse`.
        sets: names, see :func:`rotations_of`; None for :data:`fastrot.lab.sets.SETS` without the
            rotations that the model does not allow, which are logged.
        model: its name in the report.
        text: what the windows are cut from, in words.
        command: what makes this report.
        calibration: windows on which GPTQ is calibrated, where a scheme asks for it.
        progress: show a bar.

    Raises:
        RotationError: an unknown scheme or set, one that the model does not allow, too few windows,
            no causal language model, or one that is broken; before anything is measured.
    """
    if len(windows) < FEWEST:
        raise RotationError(
            f"{len(windows)} windows of text have no reliable standard error; take {FEWEST} or more"
        )
    cases: dict[str | None, Scheme] = {None: Scheme()}
    cases |= {str(Scheme.parse(name)): Scheme.parse(name) for name in schemes}
    case = load()
    check_causal(case)
    ordered = _allowed(case) if sets is None else in_order(sets)
    for name in ordered:
        if rotations := rotations_of(name):
            with naming(f"rotations {name}"):
                plan(case, rotations)
    for scheme in cases.values():
        check_groups(case, scheme)
    backwards = windows[: max(1, PREDICTED_FROM // windows.shape[1])]
    _check_run(case, backwards)
    began = time.perf_counter()
    losses: dict[tuple[str | None, str], Losses] = {}
    statistics: dict[str, dict[str, dict[int, Outliers]]] = {}
    surface: Surface | None = None
    looked_at = windows[: max(1, LOOKED_AT // windows.shape[1])]
    predicted: dict[str, dict[str, dict[str, float]]] = {}
    tokens = windows[:, 1:].numel()
    total = len(ordered) * (looked_at.numel() + backwards.numel() + tokens * len(cases))
    with tqdm(total=total, unit="token", unit_scale=True, disable=not progress) as bar:
        for name in ordered:
            case = load() if case is None else case
            if rotations := rotations_of(name):
                apply(case, rotations)
            bar.set_description(f"{name}, outliers")
            statistics[name] = outliers(case, looked_at, bar.update)
            surface = surface or Surface(*_most_uneven(statistics[name]), {})
            if name in (ordered[0], ordered[-1]):
                surface.magnitudes[name] = magnitudes(
                    case, windows[0, :-1], surface.site, surface.layer
                )
            bar.set_description(f"{name}, predictions")
            given = {label: scheme for label, scheme in cases.items() if label is not None}
            predicted[name] = predict(case, backwards, given, done=bar.update)
            for label, scheme in cases.items():
                bar.set_description(f"{name}, {label or 'float32'}")
                with quantized(case, scheme, calibration):
                    losses[label, name] = evaluate(case, windows, bar.update)
            case = None
    assert surface is not None
    exact = losses[None, ordered[0]]
    return Report(
        model=model,
        text=text,
        command=command,
        tokens=tokens,
        windows=len(windows),
        seconds=time.perf_counter() - began,
        versions={
            "fastrot": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        cells=tuple(
            Cell(scheme, name, found.perplexity, found.mean, compare(found, exact))
            for scheme in cases
            for name in ordered
            for found in (losses[scheme, name],)
        ),
        outliers=statistics,
        predicted=predicted,
        recommendations=tuple(
            recommend(scheme, {name: losses[scheme, name] for name in ordered})
            for scheme in cases
            if scheme is not None
        ),
        surface=surface,
    )


def recommend(scheme: str, losses: dict[str, Losses]) -> Recommendation:
    """The cheapest set of rotations that is not clearly worse than the best.

    Args:
        scheme: for which.
        losses: of every set; the cheapest first.
    """
    finite = {name: found for name, found in losses.items() if math.isfinite(found.mean)}
    if not finite:
        return Recommendation(scheme, None, None, {})
    best = min(finite, key=lambda name: finite[name].mean)
    chosen = next(
        name
        for name, found in finite.items()
        if name == best or not compare(found, losses[best]).is_clear
    )
    over = {name: compare(found, losses[chosen]) for name, found in losses.items()}
    return Recommendation(scheme, chosen, best, over)


def _allowed(model: Any) -> list[str]:
    """The usual sets without the rotations that a model does not allow."""
    refused = set()
    for name in ROTATIONS:
        try:
            plan(model, (name,))
        except RotationError as error:
            refused.add(name)
            log.warning("%s is left out: %s", name, error)
    return without(SETS, refused)


def _check_run(model: Any, windows: Tensor) -> None:
    """Refuse a model that is broken, or has no place where a scheme rounds."""
    seen: set[str] = set()
    with observed(model, lambda site, layer, x: seen.add(site)):
        loss = evaluate(model, windows).mean
    kind = type(model).__name__
    if not seen:
        raise RotationError(f"{kind} has no place where a scheme rounds, as far as fastrot knows")
    if not math.isfinite(loss):
        raise RotationError(
            f"the loss of {kind} is {loss} before anything is rotated or rounded; are there NaN or "
            "infinite weights?"
        )


def _most_uneven(statistics: dict[str, dict[int, Outliers]]) -> tuple[str, int]:
    places = ((site, layer) for site, layers in statistics.items() for layer in layers)
    return max(places, key=lambda place: statistics[place[0]][place[1]].peak)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, (Cell, Recommendation, Difference, Outliers)):
        return _plain(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
