"""Rotated models in several processes: tensor parallelism and FSDP2, over gloo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny
from zoo import FAMILIES, build

import fastrot

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
WIDTHS = {"llama": 192, "qwen3_moe": 56}
SIZES = {"heads": 6, "kv_heads": 6, "intermediate": WIDTHS["llama"], "vocab": 96}
CASES = {
    "plain": None,
    "fused": {"rotations": ("R1", "R2")},
    "R3": {"rotations": ("R1", "R2", "R3")},
    "blocks": {"block_size": {"R4": 4}, "transform_type": "random-hadamard"},
    "whole": {},
}


def model_of(family):
    return tiny("llama", **SIZES) if family == "llama" else build(FAMILIES[family])


def cells(tmp_path, families, processes):
    for family in families:
        for case, options in CASES.items():
            model = model_of(family)
            if options is not None:
                fastrot.apply(model, **{"rotations": ("R1", "R2", "R3", "R4")} | options)
            model.save_pretrained(tmp_path / "models" / family / case)
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(HERE / "ranks.py")]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, str(tmp_path / "models"), str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    return {(found.pop("family"), found.pop("cell")): found for found in found}


@pytest.mark.parametrize(("processes", "families"), [(2, ("llama", "qwen3_moe")), (3, ("llama",))])
def test_every_cell_is_right_or_refused(tmp_path, processes, families):
    found = cells(tmp_path, families, processes)
    blocks = {family: width // processes for family, width in WIDTHS.items()}
    refusals = {
        ("llama", "by hand whole"): f"n one of 2, 4, .*, {blocks['llama']}, or do without",
        ("llama", "FSDP, then apply"): "rotate the model before it is distributed",
        **{(f, "auto whole"): f"n one of 2, 4, .*{blocks[f]}, or do without" for f in families},
    }
    assert len(found) == 6 * len(families) + 5
    for place, value in found.items():
        if place in refusals:
            assert re.search(refusals[place], value["refusal"]), place
        elif place[1].startswith("control"):
            assert value["error"] > 0.1, place
        else:
            assert value.get("error", 1) < 1e-5, (place, value)
            assert value["same"], place
