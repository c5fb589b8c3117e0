"""``fastrot rotate`` under SIGTERM and SIGKILL at random times, then repeated.

The target is whole or absent; a repetition leaves finished files alone and ends with the bytes of a
run that nobody disturbed; after a signal that can be handled no half-written file is left.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers import contents, tiny

from fastrot.checkpoint.store import unfinished
from fastrot.cli import main

RUNS = int(os.environ.get("FASTROT_ATTACKS", "15")) // 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whole_or_absent_and_resumed(number, tmp_path):
    source, place = tmp_path / "source", tmp_path / "place"
    place.mkdir()
    model = tiny("llama", layers=24, hidden=192, intermediate=448)
    model.save_pretrained(source, max_shard_size="300KB")
    assert main(["rotate", str(source), str(tmp_path / "whole")]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) > 20
    chance = random.Random(number)
    stopped = resumed = 0
    for run in range(RUNS):
        target = place / str(run)
        folder = unfinished(target)
        command = [sys.executable, "-m", "fastrot", "rotate", str(source), str(target)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wanted = chance.choice([0, 0, 1, 3, 10, len(whole) - 3])
        while child.poll() is None and (
            not folder.exists() or len([*folder.glob("*.safetensors")]) < wanted
        ):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05) if wanted else chance.uniform(0, 2))
        child.send_signal(number)
        child.communicate(timeout=60)
        assert not (target.exists() and folder.exists())
        if target.exists():
            assert contents(target) == whole
            continue
        stopped += 1
        if number == signal.SIGTERM:
            assert child.returncode == 128 + number
            assert not [*folder.glob("*.part")]
        there = [*folder.glob("*.safetensors")] if folder.exists() else []
        resumed += bool(there)
        before = {path.name: path.stat().st_mtime_ns for path in there}
        assert main(["rotate", str(source), str(target)]) == 0
        after = {name: (target / name).stat().st_mtime_ns for name in before}
        assert after == before
        assert contents(target) == whole
        assert not folder.exists()
    assert stopped
    assert resumed or RUNS < 10
