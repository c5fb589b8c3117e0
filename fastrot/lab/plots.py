"""The plots of a report, as PNG files."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from fastrot.errors import RotationError
from fastrot.lab.report import Report

COLOURS = ("#d4701c", "#3f87d6", "#2f9e63", "#9a5fc4", "#7d8590")
DASHES = ("o-", "s--", "^:", "v-.", "x-")
FINEST = (96, 160)
"""Tokens and channels of a surface; finer ones are pooled by their greatest."""


def check_plots() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        RotationError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RotationError("a report needs matplotlib: pip install 'fastrot[plots]'")


def plot(report: Report, folder: Path) -> dict[str, Path]:
    """Write all plots of a report to a folder: what each shows, and its file."""
    made = {"loss": _losses(report), "outliers": _outliers(report), "surface": _surface(report)}
    files = {name: folder / f"{name}.png" for name in made}
    for name, figure in made.items():
        figure.savefig(files[name], dpi=110, bbox_inches="tight")
    return files


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _losses(report: Report) -> Any:
    """Nats over the model in float32, with two standard errors."""
    figure = _figure(9, 4)
    axes = figure.subplots()
    schemes = [r.scheme for r in report.recommendations]
    sets = list(report.outliers)
    width = 0.8 / len(sets)
    for place, name in enumerate(sets):
        cells = {cell.scheme: cell.added for cell in report.cells if cell.rotations == name}
        axes.bar(
            [x + width * (place - (len(sets) - 1) / 2) for x in range(len(schemes))],
            [cells[scheme].mean for scheme in schemes],
            width,
            yerr=[2 * cells[scheme].error for scheme in schemes],
            color=COLOURS[place % len(COLOURS)],
            label=name,
            capsize=3,
        )
    axes.set_xticks(range(len(schemes)), schemes)
    # Schemes lie orders of magnitude apart; some win by chance, and are below zero.
    axes.set_yscale("symlog", linthresh=0.01)
    lowest = min(cell.added.mean - 2 * cell.added.error for cell in report.cells)
    highest = max(cell.added.mean + 2 * cell.added.error for cell in report.cells)
    axes.set_ylim(min(0, lowest), 1.3 * highest)
    axes.set_ylabel("loss over float32, nats per token")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(sets))
    return figure


def _outliers(report: Report) -> Any:
    figure = _figure(10, 5.5)
    grid = figure.subplots(2, 3, sharex=True).flatten()
    seen = [*next(iter(report.outliers.values()))]
    for axes in grid[len(seen) :]:
        axes.remove()
    for axes, site in zip(grid, seen, strict=False):
        for place, (name, sites) in enumerate(report.outliers.items()):
            layers = sites.get(site, {})
            peaks = [found.peak for found in layers.values()]
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(list(layers), peaks, DASHES[place % len(DASHES)], color=colour, label=name)
        axes.set_title(site, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.supxlabel("layer")
    figure.supylabel("greatest magnitude over rms, median of tokens")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def _surface(report: Report) -> Any:
    from numpy import linspace, meshgrid

    shown = report.surface.magnitudes
    figure = _figure(6 * len(shown), 5)
    most = max(float(x.max()) for x in shown.values())
    for place, (name, magnitudes) in enumerate(shown.items()):
        axes = figure.add_subplot(1, len(shown), place + 1, projection="3d")
        heights = _pooled(magnitudes)
        channels, tokens = meshgrid(
            linspace(0, magnitudes.shape[1] - 1, heights.shape[1]),
            linspace(0, magnitudes.shape[0] - 1, heights.shape[0]),
        )
        axes.plot_surface(
            channels,
            tokens,
            heights.numpy(),
            cmap="coolwarm",
            vmin=0,
            vmax=most,
            rcount=FINEST[0],
            ccount=FINEST[1],
        )
        axes.set(xlabel="channel", ylabel="token", zlim=(0, most), title=f"rotations: {name}")
    return figure


def _pooled(magnitudes: Tensor) -> Tensor:
    size = [min(n, most) for n, most in zip(magnitudes.shape, FINEST, strict=True)]
    return adaptive_max_pool2d(magnitudes[None], size)[0]
