"""``fastrot rotate`` under SIGTERM and SIGKILL at random times: DST is whole, or absent."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers import tiny
from safetensors.torch import load_file

from fastrot.cli import main
from fastrot.cli.staging import PREFIX

RUNS = int(os.environ.get("FASTROT_ATTACKS", "15")) // 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whole_or_absent(number, tmp_path):
    source, place = tmp_path / "source", tmp_path / "place"
    place.mkdir()
    tiny("llama", layers=8, hidden=192, intermediate=448).save_pretrained(source)
    assert main(["rotate", str(source), str(tmp_path / "whole")]) == 0
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    chance = random.Random(number)
    stopped = 0
    for run in range(RUNS):
        target = place / str(run)
        command = [sys.executable, "-m", "fastrot", "rotate", str(source), str(target)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while child.poll() is None and not [*place.glob(f"{PREFIX}*")]:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 1.2))
        child.send_signal(number)
        child.communicate(timeout=60)
        if target.exists():
            found = load_file(target / "model.safetensors")
            assert all(found[name].equal(whole[name]) for name in whole)
        left = [*place.glob(f"{PREFIX}*")]
        if child.returncode:
            stopped += 1
            # After the work the interpreter is on its way out, and the signal ends it.
            assert child.returncode == 128 + number or target.exists() or number == signal.SIGKILL
        if number == signal.SIGTERM:
            assert left == []
        elif left:
            assert main(["rotate", str(source), str(place / f"again{run}")]) == 0
            assert [*place.glob(f"{PREFIX}*")] == []
    assert stopped
