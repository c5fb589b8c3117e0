"""The documents say what the tables, the rooms and the files say."""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import tiny
from test_imports import ROOMS
from transformers import AutoModelForCausalLM

import fastrot
from fastrot.cli.arguments import parser
from fastrot.demo.picture import TEXT, picture
from fastrot.mapping.document import (
    BEST_KNOWN,
    architectures_document,
    architectures_table,
    support_summary,
)
from fastrot.mapping.tables import ARCHITECTURES, SHELLS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FILE = re.compile(r"[\w./-]+(?:\.(?:py|md|csv|svg|txt|toml)|/)|Makefile")
"""What a name in backticks looks like if it is one of ours; `config.json` is a model's."""
BELOW = re.compile(r"(?<![\w./-])(?:benchmarks|docs|fastrot|tests)/[\w./-]*\w")
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def test_the_list_of_architectures_is_current():
    """`fastrot architectures > docs/architectures.md` makes it so."""
    assert read("docs/architectures.md") == architectures_document()


def test_the_matrix_of_servers_is_current():
    """`make serving-matrix` makes it so, from what its cells came to."""
    made = runpy.run_path(str(ROOT / "benchmarks/serving_matrix.py"))
    recorded = json.loads(made["RECORDED"].read_text(encoding="utf-8"))
    assert read("docs/serving-matrix.md") == made["document"](recorded)
    assert not {cell["status"] for cell in recorded["cells"].values()} & {"wrong", "unproven"}


def test_the_readme_counts_the_same():
    assert support_summary() in read("README.md")


def test_every_model_type_is_counted_once():
    counts = [int(n) for n in re.findall(r"^\|[^|]*\| (\d+) \|", support_summary(), re.MULTILINE)]
    assert sum(counts) == len(ARCHITECTURES) + len(SHELLS)


def test_the_names_in_the_summary_are_known():
    assert len(set(BEST_KNOWN)) == len(BEST_KNOWN)
    assert set(BEST_KNOWN) <= {*ARCHITECTURES, *SHELLS}
    for name in ARCHITECTURES:
        assert re.search(rf"\b{name}\b", architectures_table()), name


def missing(text, folder=ROOT):
    """Files that a document names and the repository does not have; links start at its folder."""
    names = {name for name in re.findall(r"`([^`\s]+)`", text) if FILE.fullmatch(name)}
    # In backticks also relative to the package, as in the table of rooms.
    yield from (n for n in names if not any((b / n).exists() for b in (ROOT, ROOT / "fastrot")))
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    yield from (name for name in {*BELOW.findall(text)} if not (ROOT / name).exists())
    yield from (link for link in links if not (folder / link).exists())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document):
    text = read(document)
    assert sorted(missing(text, (ROOT / document).parent)) == []
    for module in re.findall(r"-m (fastrot[\w.]*\w)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)


def test_a_name_without_a_file_is_found():
    text = "`gone.py` `gone/` `hadamard.py` `kernels/` `config.json` docs/gone.md [x](a.md)"
    assert sorted(missing(text)) == ["a.md", "docs/gone.md", "gone.py", "gone/"]


def test_contributing_explains_every_room_in_order():
    text = read("CONTRIBUTING.md")
    order = re.search(r"```\n(errors.*?)```", text, re.DOTALL)[1]
    rooms = [tuple(part.strip().split(", ")) for part in order.split("<-")]
    assert rooms == [names for names in ROOMS if not names[0].startswith("__")]
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    explained = [name for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    assert explained == [name for names in rooms for name in names]


def test_the_picture_is_current():
    """`python -m fastrot.demo.picture docs/outliers.svg` makes it so."""
    number = re.compile(r"-?\d+(?:\.\d+)?")
    written, made = read("docs/outliers.svg"), picture()
    assert number.sub("0", written) == number.sub("0", made)
    pairs = zip(number.findall(written), number.findall(made), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in pairs) < 0.3
    ElementTree.fromstring(written)
    assert len(TEXT.encode()) < 512
    compile(TEXT, "text of the picture", "exec")


def test_the_picture_shows_what_the_readme_says():
    ratios = [float(x) for x in re.findall(r"channel ([\d.]+) x median", read("docs/outliers.svg"))]
    before, after = ratios[::2], ratios[1::2]
    assert len(before) == len(after) == 4
    readme = " ".join(read("README.md").split())
    said = re.search(r"from (\d+) to (\d+) times the median to less than (\d) times", readme)
    assert [int(x) for x in said.groups()[:2]] == [int(min(before)), round(max(before))]
    assert max(after) < int(said[3])


def test_the_code_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny("llama", dtype=torch.bfloat16)
    model.save_pretrained("path/to/llama")
    names = {"x": torch.randn(3, 64)}
    for block in CODE.findall(read("README.md")):
        exec(block, names)
    rotated = AutoModelForCausalLM.from_pretrained("path/to/rotated")
    assert set(fastrot.Plan.from_dict(names["plan"].to_dict()).shapes) <= set(rotated.state_dict())


def test_the_command_line_in_the_readme_parses():
    lines = re.findall(r"^fastrot (\w+ MODEL_DIR.*)$", read("README.md"), re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        parser().parse_args(line.partition("#")[0].split())
