"""The plots of `report.py`, as PNG files."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from report import PEERS, Row, group, large, timed

matplotlib.use("Agg")
from matplotlib import pyplot


def axes_over(xlabel: str, ylabel: str, title: str) -> Any:
    """Axes with a logarithmic x."""
    axes = pyplot.subplots(figsize=(8, 4.5))[1]
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    return axes


def save(axes: Any, folder: Path, name: str) -> Path:
    """Write a plot."""
    axes.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.lower().replace(', ', '-').replace(' ', '-')}.png"
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(axes.figure)
    return path


def line(axes: Any, points: dict[int, float], style: str, label: str) -> None:
    """Draw one, if there is something to draw."""
    if points:
        axes.plot(sorted(points), [points[x] for x in sorted(points)], style, label=label)


def plot(report: Row, folder: Path) -> list[Path]:
    """Of a measurement: a roofline per dtype, and times over rows."""
    gpu = report["machine"]["gpu"]
    written = []
    groups = large(timed(report), report)
    for dtype in sorted({dtype for _, dtype in groups}):
        axes = axes_over("n", "GB/s, read and written", f"{gpu}, {dtype}")
        for (kernel, of), rows in groups.items():
            if of == dtype:
                line(axes, {n: row["gb_per_s"] for n, row in rows.items()}, "o-", kernel)
        plain = groups.get(("transform", dtype), {})
        clones = {n: row["clone"]["gb_per_s"] for n, row in plain.items()}
        line(axes, clones, "k--", "torch.clone")
        for peer in PEERS:
            found = {n: row["peers"].get(peer, {}) for n, row in plain.items()}
            points = {n: entry["gb_per_s"] for n, entry in found.items() if "gb_per_s" in entry}
            line(axes, points, ".:", peer)
        axes.set_ylim(bottom=0)
        written.append(save(axes, folder, f"roofline, {dtype}"))
    times: dict[int, dict[int, float]] = defaultdict(dict)
    for row in timed(report):
        if group(row) == ("transform", "bf16"):
            times[row["n"]][row["rows"]] = 1e3 * row["median_ms"]
    if any(len(points) > 2 for points in times.values()):
        axes = axes_over("rows", "μs", f"{gpu}, time over rows, bf16")
        for n, points in sorted(times.items()):
            if len(points) > 2:
                line(axes, points, "o-", f"n = {n}")
        axes.set_yscale("log")
        written.append(save(axes, folder, "time over rows, bf16"))
    return written


def plot_prediction(report: Row, gpus: Sequence[str], folder: Path) -> list[Path]:
    """Of a prediction, per dtype: shares of a copy's speed over n, and rooflines."""
    written = []
    for dtype in sorted({row["dtype"] for row in report["rows"]}):
        rows = [r for r in report["rows"] if (r["dtype"], r["signs"]) == (dtype, False)]
        axes = axes_over("n", "% of a copy's speed", f"{dtype}, predicted from machine code")
        for gpu in gpus:
            for along, style in (("last", "o-"), ("first", ".:")):
                points = {
                    row["n"]: row["predicted"][gpu]["percent_of_copy"]
                    for row in rows
                    if gpu in row["predicted"] and row["along"] == along
                }
                line(axes, points, style, gpu + ", first dimension" * (along == "first"))
        axes.axhline(100, color="k", linestyle="--", label="copy")
        axes.set_ylim(bottom=0)
        written.append(save(axes, folder, f"predicted, {dtype}"))
    return written + [
        roofline(report, gpu, folder) for gpu in report["gpus"] if gpu["name"] in gpus
    ]


def roofline(report: Row, gpu: Row, folder: Path) -> Path:
    """Every pass by its instructions per byte, under what the GPU can move and issue."""
    issue = gpu["multiprocessors"] * gpu["hertz"] * gpu["lanes"]
    memory = gpu["bytes_per_second"] * report["copy_share"]
    title = f"{gpu['name']}, predicted from machine code"
    axes = axes_over("instructions of threads per byte", "GB/s, read and written", title)
    roof: Callable[[float], float] = lambda density: min(memory, issue / density) / 1e9  # noqa: E731
    ridge = issue / memory
    ends = {x * ridge: roof(x * ridge) for x in (1 / 16, 1.0, 8.0)}
    axes.plot(list(ends), list(ends.values()), "k-", label="copy; issue")
    for dtype in sorted({row["dtype"] for row in report["rows"]}):
        densities = [
            part["instructions_per_element"] / part["bytes_per_element"]
            for row in report["rows"]
            if row["dtype"] == dtype and gpu["name"] in row["predicted"]
            for part in row["passes"]
        ]
        axes.plot(densities, [roof(density) for density in densities], "o", label=dtype, alpha=0.5)
    axes.set_yscale("log", base=2)
    return save(axes, folder, f"predicted, {gpu['name']}")
