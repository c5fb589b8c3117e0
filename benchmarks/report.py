"""Plots and the README's tables from files that `gpu.py` or `static_roofline.py` has written.

    python benchmarks/report.py benchmarks/results/*roofline*.json benchmarks/results/gpu-*.json

Measured GPUs are shown as measured. The others are shown as predicted, and it says so, if one of
the files is a prediction. Needs matplotlib for `--plots FOLDER` (`pip install fastrot[plots]`); the
tables go without.
"""

import argparse
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PEERS = ("fast-hadamard-transform", "HadaCore", "torch, two products", "dense")
"""Columns of the table, where the file has them."""


def load(path: Path) -> Row:
    """The file, refused if it holds neither a measurement nor a prediction."""
    report: Row = json.loads(path.read_text())
    if (report.get("kind"), "results" in report, "rows" in report) not in (
        ("measurement", True, False),
        ("prediction", False, True),
    ):
        sys.exit(f"{path} was written by neither benchmarks/gpu.py nor static_roofline.py")
    if report.get("dry_run"):
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


def markdown(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def cell(row: Row, peer: str) -> str:
    """How many times faster than a peer, or a dash."""
    median = row["peers"].get(peer, {}).get("median_ms")
    return f"{median / row['median_ms']:.2f}x" if median else "–"


def table(report: Row) -> str:
    """The README's table of a measurement."""
    machine = report["machine"]
    seen = [p for p in PEERS if any(p in r.get("peers", {}) for r in report["results"])]
    head = ["kernel", "dtype", "n", "GB/s", "of `torch.clone`", "error"]
    rows = []
    for (kernel, dtype), sizes in large(timed(report), report).items():
        for n, row in sorted(sizes.items()):
            cells = [kernel, dtype, n, f"{row['gb_per_s']:.0f}"]
            cells += [f"{row['percent_of_clone']:.0f} %", f"{row['error']:.2f}"]
            rows.append([*cells, *(cell(row, peer) for peer in seen)])
    return (
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, {report['date'][:10]}; tensors of "
        f"{report['tensor_bytes'] >> 20} MB, medians. Errors in errors of correct rounding.\n\n"
        + markdown([*head, *(f"over {peer}" for peer in seen)], rows)
    )


def decode(report: Row) -> str:
    """Times of a single vector."""
    found = [r for r in timed(report) if r["rows"] == 1 and r["kernel"] == "transform"]
    if not found:
        return ""
    rows = [
        (r["n"], r["dtype"], f"{1e3 * r['median_ms']:.1f}", f"{1e3 * r['clone']['median_ms']:.1f}")
        for r in sorted(found, key=lambda r: (r["dtype"], r["n"]))
    ]
    return "\n" + markdown(["one row", "dtype", "μs", "clone, μs"], rows)


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


def unmeasured(prediction: Row, measurements: Sequence[Row]) -> list[str]:
    """The GPUs of a prediction of which there is no measurement."""
    measured = [str(report["machine"]["gpu"]) for report in measurements]
    names = [gpu["name"] for gpu in prediction["gpus"]]
    return [name for name in names if not any(name in gpu for gpu in measured)]


def predictions(prediction: Row, gpus: Sequence[str]) -> str:
    """The README's table of a prediction: in percent of a copy's speed, with what binds."""
    rows: dict[tuple[Any, ...], Row] = defaultdict(dict)
    for row in prediction["rows"]:
        rows[row["n"], row["dtype"], row["along"], row["signs"]] |= row["predicted"]
    gpus = [gpu for gpu in gpus if any(gpu in found for found in rows.values())]
    lines = []
    for (n, dtype, along, signs), found in rows.items():
        cells = [
            f"{found[gpu]['percent_of_copy']:.0f} % ({found[gpu]['bound']})"
            if gpu in found
            else "–"
            for gpu in gpus
        ]
        lines.append([n, dtype, along + ", with signs" * signs, *cells])
    return (
        f"Predicted, not measured: upper bounds from machine code (Triton {prediction['triton']}), "
        "in percent of the speed of a copy; in brackets the unit that limits.\n\n"
        + markdown(["n", "dtype", "dimension", *(f"{gpu}, predicted" for gpu in gpus)], lines)
    )


def main() -> None:
    """Print the tables, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plots", type=Path, help="folder for the PNG files")
    arguments = parser.parse_args()
    if arguments.plots and importlib.util.find_spec("matplotlib") is None:
        sys.exit("plots need matplotlib: pip install 'fastrot[plots]'")
    reports = [load(path) for path in arguments.files]
    measurements = [report for report in reports if report["kind"] == "measurement"]
    for report in measurements:
        print(table(report), decode(report), models(report), failures(report), "", sep="\n")
    others = [report for report in reports if report["kind"] == "prediction"]
    for report in others:
        if gpus := unmeasured(report, measurements):
            print(predictions(report, gpus))
    if arguments.plots:
        from plots import plot, plot_prediction

        for report in measurements:
            print(*plot(report, arguments.plots), sep="\n")
        for report in others:
            gpus = unmeasured(report, measurements)
            print(*plot_prediction(report, gpus, arguments.plots), sep="\n")


if __name__ == "__main__":
    main()
