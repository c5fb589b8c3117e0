"""``fastrot report``: what it measures, what it recommends, and what it writes."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import contents, tiny, word_tokenizer
from transformers import LlamaForSequenceClassification
from zoo import FAMILIES, build

import fastrot
from fastrot import RotationError
from fastrot.cli import main
from fastrot.demo.outliers import with_outliers
from fastrot.lab import plots
from fastrot.lab.evaluate import Difference, Losses, compare, evaluate
from fastrot.lab.gptq import calibrated
from fastrot.lab.outliers import SITES, outliers
from fastrot.lab.page import html, sentence, write
from fastrot.lab.quantized import quantized
from fastrot.lab.report import Recommendation, Report, measure, recommend
from fastrot.lab.sets import in_order, rotations_of

IMAGES = {"loss": "loss.png", "outliers": "outliers.png", "surface": "surface.png"}
has_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs the extra plots"
)


IMAGES_OF = {name: Path(file) for name, file in IMAGES.items()}


def load():
    return with_outliers(tiny("llama"), scale=64)


@pytest.fixture(scope="module")
def windows():
    """Text that the model itself likes best, so that every error makes it less likely."""
    model = load()
    ids = torch.arange(3, 19)[:, None]
    with torch.no_grad():
        while ids.shape[1] < 25:
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.fixture(scope="module")
def report(windows):
    words = {"model": "tiny <model>", "text": "noise & more", "command": "report 'a &lt; b'"}
    return measure(load, windows, ["W8A8", "a4kv4"], ["r1-r4", "none"], **words)


@pytest.mark.parametrize(
    ("name", "rotations"),
    [
        ("none", ()),
        ("r1", ("R1",)),
        ("R1R2", ("R1", "R2")),
        ("R1-R4", ("R1", "R2", "R3", "R4")),
        ("R2-R3", ("R2", "R3")),
        ("R1R2R4", ("R1", "R2", "R4")),
    ],
)
def test_names_of_sets(name, rotations):
    assert rotations_of(name) == rotations


@pytest.mark.parametrize("name", ["", "R5", "R2R1", "R4-R1", "R1-", "R1R2x", "all", "R1,R2"])
def test_unknown_sets_are_refused(name):
    with pytest.raises(RotationError, match="is unknown; there are none, and R1, R2, R3, R4"):
        rotations_of(name)


def test_sets_are_named_once_the_cheapest_first():
    given = ["R1R2R3R4", "r1r2", "R4", "none", "R1-R2", "R1-R4"]
    assert in_order(given) == ["none", "R4", "R1R2", "R1-R4"]


def test_every_cell_is_what_a_model_of_its_own_says(report, windows):
    found = {(cell.scheme, cell.rotations): cell for cell in report.cells}
    assert list(found) == [(s, r) for s in (None, "w8a8", "a4kv4") for r in ("none", "R1-R4")]
    exact = evaluate(load(), windows)
    for (scheme, rotations), cell in found.items():
        model = load()
        if rotations != "none":
            fastrot.apply(model, ("R1", "R2", "R3", "R4"))
        with quantized(model, scheme or "w16"):
            losses = evaluate(model, windows)
        assert cell.loss == pytest.approx(losses.mean, abs=1e-6 if scheme else 1e-3)
        assert cell.perplexity == pytest.approx(math.exp(cell.loss))
        if scheme:
            assert cell.added == compare(losses, exact)
    assert found[None, "none"].added == Difference(0.0, 0.0)
    # Rotations are exact: before anything is rounded nothing is added.
    assert abs(found[None, "R1-R4"].added.mean) < 1e-5
    assert found["a4kv4", "none"].added.mean > found["a4kv4", "R1-R4"].added.mean > 0.1


def test_outliers_before_and_after(report, windows):
    assert tuple(report.outliers["none"]) == SITES[:6]
    assert report.outliers["none"] == outliers(load(), windows)
    site, layer = report.surface.site, report.surface.layer
    peaks = [o.peak for layers in report.outliers["none"].values() for o in layers.values()]
    assert report.outliers["none"][site][layer].peak == max(peaks)
    before, after = (report.surface.magnitudes[name] for name in ("none", "R1-R4"))
    assert before.shape == after.shape
    assert len(before) == 24
    assert (after.max() / after.median()) < (before.max() / before.median())


def shifted(*means, spread=0.1):
    """Losses with these means, whose differences spread."""
    generator = torch.Generator().manual_seed(0)
    noise = spread * torch.randn(len(means), 100, generator=generator, dtype=torch.float64)
    noise -= noise.mean(1, keepdim=True)
    pairs = zip(("none", "R1R2", "R1-R4"), means, noise, strict=True)
    return {name: Losses(mean + n) for name, mean, n in pairs}


@pytest.mark.parametrize(
    ("means", "chosen", "best"),
    [
        ((3.0, 2.0, 1.0), "R1-R4", "R1-R4"),
        ((1.0, 2.0, 3.0), "none", "none"),
        ((2.0, 1.0, 0.99), "R1R2", "R1-R4"),
        ((1.0, 0.5, 0.99), "R1R2", "R1R2"),
        ((1.0, 0.999, 0.998), "none", "R1-R4"),
        ((math.nan, 2.0, 1.0), "R1-R4", "R1-R4"),
        ((1.0, math.nan, math.inf), "none", "none"),
    ],
)
def test_the_cheapest_set_that_is_not_clearly_worse_is_recommended(means, chosen, best):
    losses = shifted(*means)
    found = recommend("w4", losses)
    assert (found.rotations, found.best) == (chosen, best)
    assert found.over[chosen] == Difference(0.0, 0.0)
    for name, difference in found.over.items():
        if math.isfinite(losses[name].mean):
            assert difference == compare(losses[name], losses[chosen])


def test_nothing_is_recommended_where_everything_broke():
    found = recommend("w4", shifted(math.nan, math.nan, math.inf))
    assert (found.rotations, found.best, found.over) == (None, None, {})


def test_what_broke_everywhere_is_said(report):
    broke = replace(report, recommendations=(Recommendation("a4kv4", None, None, {}),))
    assert "a4kv4: the loss is not finite with any set of rotations" in html(broke, IMAGES)


def test_a_sum_without_weights_is_not_shown(report):
    def page(scheme):
        costs = {name: {scheme: {"mlp": 0.1234}} for name in report.predicted}
        cells = tuple(replace(c, scheme=scheme) for c in report.cells if c.scheme == "w8a8")
        return html(replace(report, predicted=costs, cells=cells, recommendations=()), IMAGES)

    row = "<td>0.1234</td><td>{}</td>"
    assert row.format("0.1234") in page("a4")
    assert row.format("") in page("w4gptq-a4")


def with_heads_of_34():
    """R2 and R3 are refused: no Hadamard matrix of that order is known."""
    return tiny("llama", head_dim=34)


def test_usual_sets_leave_out_what_a_model_refuses(caplog):
    windows = torch.arange(3, 11)[:, None] + torch.arange(9)
    with caplog.at_level("WARNING", logger="fastrot"):
        made = measure(with_heads_of_34, windows, ["a8"], model="", text="", command="")
    assert [*made.outliers] == ["none", "R1", "R1R4"]
    for name in ("R2", "R3"):
        assert f"{name} is left out: {name} of model.layers.0" in caplog.text


@pytest.mark.parametrize(
    ("schemes", "sets", "message"),
    [
        (["a8"], ["none", "R1-R4"], "rotations R1-R4: "),
        (["w4g36gptq"], ["none"], r"scheme w4g36gptq: 96 inputs of .* into groups of 36"),
        (["a8", "a4g36"], ["none"], "into groups of 36"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_runs(schemes, sets, message, monkeypatch):
    monkeypatch.setattr("fastrot.lab.report.outliers", None)
    with pytest.raises(RotationError, match=message):
        measure(
            with_heads_of_34, torch.ones(8, 9).long(), schemes, sets, model="", text="", command=""
        )


def broken():
    model = tiny("llama")
    model.model.norm.weight.data[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "schemes", "message"),
    [
        ("llama", ["a8", "kv4g64"], "scheme kv4g64: keys and values of layer 0: .* of 64"),
        ("minicpm3", ["kv4g32"], "scheme kv4g32: keys and values of layer 0: .* of 32"),
        ("mamba", ["kv4"], "scheme kv4: MambaForCausalLM put no keys and values into its cache"),
        ("mamba", [], "MambaForCausalLM has no place where a scheme rounds"),
        (broken, ["a8"], "the loss of LlamaForCausalLM is nan before anything is rotated"),
    ],
)
def test_a_model_that_can_not_be_measured_is_refused_first(make, schemes, message, monkeypatch):
    monkeypatch.setattr("fastrot.lab.report.outliers", None)
    windows = torch.arange(3, 11)[:, None] + torch.arange(9)
    load = make if callable(make) else lambda: build(FAMILIES[make], torch.float32)
    with pytest.raises(RotationError, match=message):
        measure(load, windows, schemes, ["none"], model="", text="", command="")


def test_a_model_without_a_head_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("fastrot.lab.report.outliers", None)
    model = LlamaForSequenceClassification(tiny("llama").config)
    with pytest.raises(RotationError, match="LlamaForSequenceClassification has no language-model"):
        measure(lambda: model, torch.ones(8, 9).long(), ["a8"], model="", text="", command="")


@pytest.mark.usefixtures("without_plots")
def test_a_folder_that_can_not_be_written_is_refused_first(tmp_path, capsys, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fastrot.lab.report.measure", None)
    monkeypatch.setattr(Path, "touch", refuse)
    for out in (tmp_path / "old", tmp_path / "new" / "folder"):
        (tmp_path / "old").mkdir(exist_ok=True)
        assert main(["report", "demo", "--out", str(out)]) == 2
        assert f"Permission denied: '{out / 'report.json'}'" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == [tmp_path / "old"]


@pytest.mark.usefixtures("without_plots")
def test_the_folder_is_made_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastrot.lab.report.measure", None)
    (tmp_path / "file").write_text("")
    assert main(["report", "demo", "--out", str(tmp_path / "file" / "report")]) == 2
    assert "file" in capsys.readouterr().err
    with pytest.raises(TypeError):
        main(["report", "demo", "--debug", "--out", str(tmp_path / "new" / "report")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_few_windows_are_refused(windows):
    with pytest.raises(RotationError, match="7 windows of text have no reliable standard error"):
        measure(load, windows[:7], model="", text="", command="")


class Reader(HTMLParser):
    """The text of a page, what it loads, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.text, self.loads, self.open = "", [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_was_measured_and_loads_nothing_else(report):
    reader = Reader()
    page = html(report, IMAGES)
    reader.feed(page)
    assert reader.open == []
    assert sorted(reader.loads) == ["loss.png", "outliers.png", "report.json", "surface.png"]
    assert "http" not in page
    for words in ("tiny <model>", "noise & more", "report 'a &lt; b'", "384 tokens"):
        assert words in reader.text
    for cell in report.cells:
        assert f"{cell.perplexity:.4g}" in reader.text
        assert f"{cell.added.mean:+.3f} ± {cell.added.error:.3f}" in reader.text
    for found in report.recommendations:
        assert sentence(report, found) in reader.text
    for costs in (costs for each in report.predicted.values() for costs in each.values()):
        assert f"{sum(costs.values()):.4f}" in reader.text
    assert page.count("class=chosen") == len(report.recommendations) == 2


def test_a_recommendation_in_words(report):
    found = report.recommendations[1]
    assert re.fullmatch(
        r"a4kv4: R1-R4, perplexity [\d.]+; \+[\d.]+ ± [\d.]+ nats with none \([\d.,]+\)",
        sentence(report, found),
    )


def test_what_is_not_finite_is_null_in_json(report):
    broken = Report(**{**vars(report), "seconds": math.nan})
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["seconds"] is None


@has_matplotlib
def test_a_folder_holds_page_plots_and_figures(report, tmp_path):
    page = write(report, tmp_path / "new" / "folder")
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"index.html", "report.json", *IMAGES.values()}
    for image in IMAGES.values():
        data = (page.parent / image).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    data = json.loads((page.parent / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["outliers"]["none"]["keys"]["1"]["peak"] == report.outliers["none"]["keys"][1].peak
    assert len(data["cells"]) == 6
    assert set(data["predicted"]["none"]["a4kv4"]) == set(report.outliers["none"])


@pytest.mark.parametrize("dies", ["plot", "html", "replace"])
def test_no_page_shows_files_of_two_reports(dies, report, tmp_path, monkeypatch):
    """Before anything is replaced the old report is whole; after that there is no old page."""
    monkeypatch.setattr("fastrot.lab.page.plot", lambda *_: IMAGES_OF)
    write(report, tmp_path)
    before = contents(tmp_path)
    assert set(before) == {"index.html", "report.json"}

    def die(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace" if dies == "replace" else f"fastrot.lab.page.{dies}", die)
    with pytest.raises(OSError, match="No space left"):
        write(replace(report, text="another"), tmp_path)
    if dies == "replace":
        del before["index.html"]
    assert contents(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr("fastrot.lab.page.plot", lambda *_: IMAGES_OF)
    write(replace(report, text="another"), tmp_path)
    assert all(b"another" in data for data in contents(tmp_path).values())


@pytest.fixture
def without_plots(monkeypatch):
    """Plots are not what a test is about: they are empty files."""
    monkeypatch.setattr(plots, "check_plots", lambda: None)

    def plot(report, folder):
        return {name: folder / file for name, file in IMAGES.items()}

    monkeypatch.setattr("fastrot.lab.page.plot", plot)


@pytest.mark.usefixtures("without_plots")
def test_on_the_command_line(tmp_path, capsys):
    folder, text, out = tmp_path / "some model", tmp_path / "text", tmp_path / "out"
    load().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 64, (1100,), generator=generator).tolist()
    text.write_text(" ".join(f"w{number}" for number in words))
    command = ["report", str(folder), "--scheme", "W8A8", "--rotations", "none", "r1r2"]
    command += ["--tokens", "600", "--text", str(text), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    data = json.loads((out / "report.json").read_text())
    assert printed[0].startswith("w8a8: ")
    assert printed[-1] == f"written to {out / 'index.html'}"
    # An eighth of the tokens is shorter than the model allows.
    assert (data["tokens"], data["windows"]) == (600, 8)
    assert (data["model"], data["text"]) == ("some model", "text")
    assert data["command"].startswith(f"fastrot report '{folder}' --scheme W8A8 --rotations")
    assert [cell["rotations"] for cell in data["cells"]] == ["none", "R1R2"] * 2


@pytest.mark.usefixtures("without_plots")
def test_gptq_is_calibrated_on_other_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrot.lab.quantized.calibrated", spy := Spy())
    options = ["--scheme", "w3", "w3gptq", "--rotations", "none", "--tokens", "2048"]
    assert main(["report", "demo", *options, "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["tokens"], data["windows"]) == (2048, 8)
    losses = {cell["scheme"]: cell["loss"] for cell in data["cells"]}
    assert losses["w3gptq"] < losses["w3"]
    assert spy.windows.shape == (8, 257)


class Spy:
    windows = None

    def __call__(self, model, linears, windows):
        self.windows = windows
        return calibrated(model, linears, windows)


@pytest.mark.usefixtures("without_plots")
def test_of_the_embedded_model(tmp_path, capsys):
    command = ["report", "demo", "--scheme", "a4kv4", "--rotations", "none", "R1-R4"]
    assert main([*command, "--tokens", "1024", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("a4kv4: R1-R4, perplexity ")


REFUSED = {
    "--scheme w99": "bits=99 is not from 2 to 16",
    "--scheme w4a4 int4": "scheme 'int4' is unknown",
    "--rotations R9": "set of rotations 'R9' is unknown",
    "--tokens 0": "is not a positive integer",
    "--out FILE": "is a file; give a folder",
    "--text FILE": "the text has 5 tokens, and 8 windows of 512 need",
    "--text nowhere": "nowhere",
}


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("options", REFUSED)
def test_refusals_come_before_measurements(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastrot.lab.report.evaluate", None)
    (tmp_path / "FILE").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "demo", *options.split()]) == 2
    assert REFUSED[options] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_the_code_in_the_document_runs(capsys):
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(code.replace("2048", "1024"), {})
    assert "Difference(mean=-" in capsys.readouterr().out


def test_without_matplotlib_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["report", "demo", "--out", str(tmp_path / "out")]) == 2
    assert "a report needs matplotlib: pip install 'fastrot[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
