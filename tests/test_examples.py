"""The scripts in examples/, on a tiny checkpoint; each where its tool is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny, word_tokenizer
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    tiny("llama", hidden=128, heads=8, intermediate=256).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(find_spec("optimum.quanto") is None, reason="optimum-quanto is not installed")
def test_quanto(source, tmp_path):
    printed = run("quanto", source, tmp_path / "out")
    assert printed.strip().endswith("after loading: 0.0e+00")
    assert (tmp_path / "out" / "quanto.safetensors").exists()


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao(source, tmp_path):
    printed = run("torchao_int8", source, tmp_path / "out")
    assert "the same tokens: True" in printed
    assert printed.strip().endswith("after loading: 0.0e+00")
    assert (tmp_path / "out" / "torchao.pt").exists()


@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="llm-compressor is not installed")
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_llm_compressor(source, tmp_path, scheme):
    """What it wrote computes the source's function but for rounding, loaded as it is."""
    run("llm_compressor", source, tmp_path / "out", "--scheme", scheme)
    original = AutoModelForCausalLM.from_pretrained(source)
    ids = random_ids(original, 2, 12, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(logits(model, ids), logits(original, ids)) < 0.3
    assert next(model.parameters()).dtype == torch.float32
