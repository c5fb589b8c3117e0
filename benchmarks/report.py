"""Plots and the README's table from a file that `gpu.py` has written.

    python benchmarks/report.py benchmarks/results/gpu-h200.json --plots docs/plots

Needs matplotlib for the plots (`pip install fastrot[plots]`); the table goes without.
"""

import argparse
import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PEERS = ("fast-hadamard-transform", "HadaCore", "torch, two products", "dense")
"""Columns of the table, where the file has them."""


def load(path: Path) -> Row:
    """The file, refused if it holds no measurement."""
    report: Row = json.loads(path.read_text())
    if report.get("kind") != "measurement" or "results" not in report:
        sys.exit(f"{path} was not written by benchmarks/gpu.py")
    if report["dry_run"]:
        sys.exit(f"{path} is a dry run in Triton's interpreter: its times mean nothing")
    return report


def timed(report: Row) -> list[Row]:
    """The cases that were right and have a time."""
    return [r for r in report["results"] if r["status"] == "ok" and "percent_of_clone" in r]


def group(row: Row) -> tuple[str, str]:
    """What is compared over sizes: kernel with its variant, and dtype."""
    words = [row["kernel"]]
    words += ["first dimension"] * (row["dim"] == 0) + ["with signs"] * row["signs"]
    return ", ".join(words), row["dtype"]


def large(rows: list[Row], report: Row) -> dict[tuple[str, str], dict[int, Row]]:
    """By group and size, the cases whose tensors show bandwidth: the first of each, if several."""
    found: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        nbytes = row["n"] * row["rows"] * (4 if row["dtype"] == "fp32" else 2)
        if nbytes >= report["tensor_bytes"]:
            found[group(row)].setdefault(row["n"], row)
    return found


def cell(row: Row, peer: str) -> str:
    """How many times faster than a peer, or a dash."""
    median = row["peers"].get(peer, {}).get("median_ms")
    return f"{median / row['median_ms']:.2f}x" if median else "–"


def table(report: Row) -> str:
    """The README's table, in Markdown."""
    machine = report["machine"]
    seen = [p for p in PEERS if any(p in r.get("peers", {}) for r in report["results"])]
    head = ["kernel", "dtype", "n", "GB/s", "of `torch.clone`", "error"]
    head += [f"over {peer}" for peer in seen]
    megabytes = report["tensor_bytes"] >> 20
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, {report['date'][:10]}; tensors of {megabytes} MB, medians. "
        "Errors in errors of correct rounding.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for (kernel, dtype), rows in large(timed(report), report).items():
        for n in sorted(rows):
            row = rows[n]
            cells = [kernel, dtype, str(n), f"{row['gb_per_s']:.0f}"]
            cells += [f"{row['percent_of_clone']:.0f} %", f"{row['error']:.2f}"]
            lines.append(f"| {' | '.join(cells + [cell(row, peer) for peer in seen])} |")
    return "\n".join(lines)


def decode(report: Row) -> str:
    """Times of a single vector, in Markdown."""
    rows = [r for r in timed(report) if r["rows"] == 1 and r["kernel"] == "transform"]
    if not rows:
        return ""
    lines = ["", "| one row | dtype | μs | clone, μs |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["dtype"], row["n"])):
        ours, clone = 1e3 * row["median_ms"], 1e3 * row["clone"]["median_ms"]
        lines.append(f"| {row['n']} | {row['dtype']} | {ours:.1f} | {clone:.1f} |")
    return "\n".join(lines)


def models(report: Row) -> str:
    """Times of whole rotations."""
    lines = []
    for row in report["results"]:
        for key, run in row.items():
            if key.startswith("undo="):
                spread = f"{min(run['all_seconds']):.3f} to {max(run['all_seconds']):.3f}"
                peak = f"peak {run['peak_bytes'] / 2**30:.1f} GiB" if run["peak_bytes"] else ""
                lines.append(
                    f"- `fastrot.apply({'+'.join(row['rotations'])}, {key})`, {row['model']}: "
                    f"{run['seconds']:.3f} s ({spread}), {peak}"
                )
        if row["kernel"] == "llm-compressor" and "seconds" in row:
            lines.append(f"- llm-compressor, {row['model']}: {row['seconds']:.3f} s")
    return "\n".join(["", *lines]) if lines else ""


def failures(report: Row) -> str:
    """What went wrong or was not reached."""
    counts: dict[str, int] = defaultdict(int)
    lines = []
    for row in report["results"]:
        counts[row["status"]] += 1
        if row["status"] in ("wrong", "error"):
            where = " ".join(str(row[k]) for k in ("kernel", "n", "rows", "dtype") if k in row)
            error = f"error {row['error']}" if "error" in row else ""
            lines.append(f"- {row['status']}: {where} {row.get('failed', error)}")
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join(["", f"Cases: {total}.", *lines])


def plot(report: Row, folder: Path) -> list[Path]:
    """A roofline per dtype, and times over rows: PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    gpu = report["machine"]["gpu"]
    written = []

    def save(name: str, axes: Any, ylabel: str, xlabel: str) -> None:
        axes.set(xlabel=xlabel, ylabel=ylabel, title=f"{gpu}, {name}")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.png"
        axes.figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(axes.figure)
        written.append(path)

    groups = large(timed(report), report)
    for dtype in sorted({dtype for _, dtype in groups}):
        axes = pyplot.subplots(figsize=(8, 4.5))[1]
        for (kernel, of), rows in groups.items():
            if of == dtype:
                sizes = sorted(rows)
                axes.plot(sizes, [rows[n]["gb_per_s"] for n in sizes], "o-", label=kernel)
        plain = groups.get(("transform", dtype), {})
        clones = [(n, plain[n]["clone"]["gb_per_s"]) for n in sorted(plain)]
        axes.plot(*zip(*clones, strict=True), "k--", label="torch.clone") if clones else None
        for peer in PEERS:
            points = [
                (n, plain[n]["peers"][peer]["gb_per_s"])
                for n in sorted(plain)
                if "gb_per_s" in plain[n]["peers"].get(peer, {})
            ]
            axes.plot(*zip(*points, strict=True), ".:", label=peer) if points else None
        axes.set_ylim(bottom=0)
        save(f"roofline, {dtype}", axes, "GB/s, read and written", "n")
    axes = pyplot.subplots(figsize=(8, 4.5))[1]
    lines: dict[int, dict[int, float]] = defaultdict(dict)
    for row in timed(report):
        if group(row) == ("transform", "bf16"):
            lines[row["n"]][row["rows"]] = 1e3 * row["median_ms"]
    for n, times in sorted(lines.items()):
        if len(times) > 2:
            axes.plot(sorted(times), [times[r] for r in sorted(times)], "o-", label=f"n = {n}")
    if axes.lines:
        axes.set_yscale("log")
        save("time over rows, bf16", axes, "μs", "rows")
    return written


def main() -> None:
    """Print the tables, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the PNG files")
    arguments = parser.parse_args()
    report = load(arguments.file)
    print(table(report), decode(report), models(report), failures(report), sep="\n")
    if arguments.plots:
        if importlib.util.find_spec("matplotlib") is None:
            sys.exit("plots need matplotlib: pip install 'fastrot[plots]'")
        for path in plot(report, arguments.plots):
            print(path)


if __name__ == "__main__":
    main()
