"""A process that never imports fastrot loads rotated checkpoints, if it was asked to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_rotated

import fastrot

ROOT = Path(fastrot.__file__).parents[1]
ENTRY_POINTS = "[torch.backends]\nfastrot = fastrot_autoload:autoload\n"

FIRST = {
    "torch": "import torch; from transformers import AutoModelForCausalLM as A",
    "transformers": "from transformers import AutoModelForCausalLM as A",
    "a model": "from transformers import LlamaForCausalLM as A",
    "its base class": """
import transformers.modeling_utils
from transformers import LlamaForCausalLM as A""",
}

LOAD = """
import torch
model = A.from_pretrained({!r})
ids = torch.randint(
    3, model.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    print(model(ids).logits.double().sum().item())"""


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotated")
    return str(folder), save_rotated(folder)[1]


@pytest.fixture
def process(tmp_path):
    """Runs code where fastrot is installed, as another environment's torch would find it."""
    metadata = tmp_path / "installed-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)

    def run(code, **environment):
        path = os.pathsep.join(filter(None, (str(tmp_path), *others, str(ROOT))))
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
        )

    return run


def test_the_entry_point_is_that_of_the_package():
    declared = (ROOT / "pyproject.toml").read_text()
    group, line = ENTRY_POINTS.strip().splitlines()
    name, _, target = line.partition(" = ")
    assert f'[project.entry-points."{group[1:-1]}"]\n{name} = "{target}"' in declared


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_a_rotated_checkpoint_loads(first, process, rotated):
    folder, expected = rotated
    done = process(FIRST[first] + LOAD.format(folder), FASTROT_AUTOLOAD="1")
    # Products round differently where memory begins elsewhere; without R4 the sum is another.
    assert [float(word) for word in done.stdout.split()] == [pytest.approx(expected, rel=1e-5)], (
        done.stderr
    )


@pytest.mark.parametrize("choice", [{}, {"FASTROT_AUTOLOAD": "0"}])
def test_nothing_happens_unasked(choice, process, rotated):
    done = process(FIRST["torch"] + LOAD.format(rotated[0]), **choice)
    assert done.returncode != 0
    assert "fastrot" in done.stderr.splitlines()[-1]
    code = "import sys, torch, transformers.modeling_utils; print('fastrot' in sys.modules)"
    assert process(code, **choice).stdout.split() == ["False"]


def test_torch_alone_brings_nothing_along(process):
    code = "import sys, torch; print('fastrot' in sys.modules, 'transformers' in sys.modules)"
    assert process(code, FASTROT_AUTOLOAD="1").stdout.split() == ["False", "False"]


def test_a_fastrot_that_is_broken_stops_nobody(process):
    code = """
import sys
sys.modules["fastrot"] = None
from transformers import LlamaForCausalLM
print(LlamaForCausalLM.__name__)"""
    done = process(code, FASTROT_AUTOLOAD="1")
    assert done.stdout.split() == ["LlamaForCausalLM"]
    assert "FASTROT_AUTOLOAD=1, but no fastrot: ModuleNotFoundError" in done.stderr
