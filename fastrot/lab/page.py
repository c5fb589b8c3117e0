"""A report as a folder: one static HTML page, its plots, and everything measured as JSON."""

import json
import os
from html import escape
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from fastrot.lab.evaluate import Difference
from fastrot.lab.outliers import CACHED, MASSIVE
from fastrot.lab.plots import plot
from fastrot.lab.predict import PLACES
from fastrot.lab.report import Recommendation, Report
from fastrot.lab.schemes import Scheme

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1f2328; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #d1d9e0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.chosen { background: #dff3e4; font-weight: 600; }
img { max-width: 100%; } code, pre { background: #f3f4f6; padding: .1rem .3rem; }
pre { padding: .75rem; white-space: pre-wrap; } small { color: #59636e; }
"""


def write(report: Report, folder: Path) -> Path:
    """Write a report to a folder, which is made; files of an earlier report are replaced.

    They are replaced once all are made. The page goes first and comes last, so that none shows the
    files of two reports.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    with TemporaryDirectory(prefix=".report-", dir=folder) as made:
        fresh = Path(made)
        data = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        (fresh / "report.json").write_text(data + "\n", encoding="utf-8")
        images = {name: file.name for name, file in plot(report, fresh).items()}
        others = [*fresh.iterdir()]
        (fresh / page.name).write_text(html(report, images), encoding="utf-8")
        page.unlink(missing_ok=True)
        for file in (*others, fresh / page.name):
            os.replace(file, folder / file.name)
    return page


def html(report: Report, images: dict[str, str]) -> str:
    """The page.

    Args:
        report: what it shows.
        images: files of the plots ``loss``, ``outliers`` and ``surface``, as seen from the page.
    """
    surface = report.surface
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts = [
        f"<h1>Rotations for {escape(report.model)}</h1>",
        f"<p>{report.tokens:,} tokens in {report.windows} windows of {escape(report.text)}. "
        "Quantization is simulated: round to nearest, but for weights with gptq in the name of a "
        "scheme, which GPTQ rounds, calibrated on other text. Differences are paired over windows, "
        "± one standard error; less than two of them is no clear difference.</p>",
        "<h2>Which rotation</h2>",
        _list([sentence(report, found) for found in report.recommendations]),
        "<h2>Perplexity</h2>",
        _perplexities(report),
        _image(images["loss"], "Loss over float32 for every scheme and set of rotations"),
        "<h2>Where the loss comes from</h2>",
        "<p>Nats per token that rounding is predicted to cost at each place, over all layers, to "
        "second order and as if places did not mind one another; beside their sum what was "
        "measured.</p>",
        *(f"<h3>{escape(name)}</h3>{_predicted(report, name)}" for name in report.predicted),
        "<h2>Outliers</h2>",
        "<p>Greatest magnitude of a token over its rms, median over tokens and then over layers; "
        "in brackets the kurtosis, which is 3 for a normal distribution. Measured where a scheme "
        "rounds: after the online rotations.</p>",
        _outliers(report),
        _image(images["outliers"], "Greatest magnitude over rms in every layer"),
        f"<h2>The {surface.site} {'input ' if surface.site not in CACHED else ''}"
        f"of layer {surface.layer}</h2>",
        f"<p>The most uneven place with {escape(' and then with '.join(surface.magnitudes))}: "
        "magnitudes of one text.</p>",
        _image(images["surface"], "Magnitudes over tokens and channels"),
        "<h2>Made by</h2>",
        f"<pre>{escape(report.command)}</pre>",
        f"<p><small>{escape(versions)}; {report.seconds:.0f} s. All figures: "
        '<a href="report.json">report.json</a></small></p>',
    ]
    title = f"<title>Rotations for {escape(report.model)}</title>"
    head = f'<meta charset="utf-8">{title}<style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def sentence(report: Report, found: Recommendation) -> str:
    """A recommendation in words, as text."""
    cells = {cell.rotations: cell for cell in report.cells if cell.scheme == found.scheme}
    if found.rotations is None:
        return f"{found.scheme}: the loss is not finite with any set of rotations"
    chosen = cells[found.rotations]
    words = f"{found.scheme}: {found.rotations}, perplexity {_number(chosen.perplexity)}"
    if found.rotations != found.best:
        words += f", which is not clearly worse than {found.best}"
    others = [
        f"{_nats(found.over[name])} with {name} ({_number(cell.perplexity)})"
        for name, cell in cells.items()
        if name != found.rotations
    ]
    return "; ".join([words, *others])


def _perplexities(report: Report) -> str:
    sets = list(report.outliers)
    chosen = {found.scheme: found.rotations for found in report.recommendations}
    rows = []
    for scheme in dict.fromkeys(cell.scheme for cell in report.cells):
        cells = [cell for cell in report.cells if cell.scheme == scheme]
        texts = [
            f"<td{' class=chosen' if chosen.get(scheme or '') == cell.rotations else ''}>"
            f"{_number(cell.perplexity)} <small>{_signed(cell.added)}</small></td>"
            for cell in cells
        ]
        rows.append(f"<td>{escape(scheme or 'float32')}</td>{''.join(texts)}")
    note = "<p><small>In grey: nats per token over the model as it is.</small></p>"
    return _table(["scheme", *sets], rows) + note


def _predicted(report: Report, name: str) -> str:
    measured = {cell.scheme: cell.added for cell in report.cells if cell.rotations == name}
    schemes = report.predicted[name]
    places = [place for place in PLACES if any(place in costs for costs in schemes.values())]
    rows = []
    for scheme, costs in schemes.items():
        cells = [f"{costs[place]:.4f}" if place in costs else "" for place in places]
        whole = "weights" in costs or Scheme.parse(scheme).weights is None
        cells += [f"{sum(costs.values()):.4f}" * whole, f"{measured[scheme].mean:.3f}"]
        texts = "".join(f"<td>{text}</td>" for text in cells)
        rows.append(f"<td>{escape(scheme)}</td>{texts}")
    return _table(["scheme", *places, "sum", "measured"], rows)


def _outliers(report: Report) -> str:
    rows = []
    first = next(iter(report.outliers.values()))
    for site in first:
        cells = []
        for sites in report.outliers.values():
            layers = sites.get(site, {}).values()
            peak = median(found.peak for found in layers) if layers else float("nan")
            kurtosis = median(found.kurtosis for found in layers) if layers else float("nan")
            cells.append(f"<td>{_number(peak)} ({_number(kurtosis)})</td>")
        rows.append(f"<td>{site}</td>{''.join(cells)}")
    massive = {
        site: (sum(o.massive for o in layers.values()), sum(o.vectors for o in layers.values()))
        for site, layers in first.items()
    }
    counts = [f"{site} {some:,} of {seen:,}" for site, (some, seen) in massive.items() if some]
    note = (
        f"<p>Massive vectors, whose rms is more than {MASSIVE} times the median of their layer: "
        f"{', '.join(counts) or 'none'}.</p>"
    )
    return _table(["site", *report.outliers], rows) + note


def _table(heads: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _image(file: str, words: str) -> str:
    return f'<p><img src="{escape(file)}" alt="{escape(words)}"></p>'


def _number(value: float) -> str:
    if value != value:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _nats(difference: Difference) -> str:
    return f"{difference.mean:+.3f} ± {difference.error:.3f} nats"


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.3f} ± {difference.error:.3f}"
