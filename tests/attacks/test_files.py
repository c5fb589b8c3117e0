"""Spoiled checkpoints on the command line: done, or refused in one line; never worse."""

import json
import os
import random
import shutil
import time

import pytest
from helpers import tiny

from attacks.hostile import HOSTILE
from fastrot.cli import main

RUNS = int(os.environ.get("FASTROT_ATTACKS", "10"))
LIMIT = 30
"""Seconds after which a command counts as hanging; it takes less than two."""


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "source"
    tiny("llama").save_pretrained(folder)
    return folder


def attack(capsys, command, *folders):
    """Run a command; returns its exit status."""
    capsys.readouterr()
    start = time.monotonic()
    status = main([command, *map(str, folders)])
    assert time.monotonic() - start < LIMIT
    out, err = capsys.readouterr()
    assert err.count("\n") == (status == 2), err
    assert bool(out) == (status != 2)
    return status


@pytest.mark.parametrize("settings", random.Random(0).sample(HOSTILE, min(4 * RUNS, len(HOSTILE))))
def test_hostile_settings(settings, honest, tmp_path, capsys):
    source, target = shutil.copytree(honest, tmp_path / "source"), tmp_path / "target"
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    attack(capsys, "plan", source)
    done = attack(capsys, "rotate", source, target) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", *(["target"] if done else [])}
    assert not done or attack(capsys, "verify", source, target) == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_files(name, honest, tmp_path, capsys):
    """Bytes are flipped, cut off or put in; the checkpoint is rotated as it is, or refused."""
    source, target = shutil.copytree(honest, tmp_path / "source"), tmp_path / "target"
    whole = (honest / name).read_bytes()
    chance = random.Random(name)
    for _ in range(RUNS):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.randrange(min(len(data), 4000))
            edit = chance.choice(["flip", "cut", "put", "drop"])
            if edit == "flip":
                data[place] ^= 1 << chance.randrange(8)
            elif edit == "cut":
                del data[place or 1 :]
            elif edit == "put":
                data[place:place] = chance.randbytes(3)
            else:
                del data[place : place + chance.randrange(1, 20)]
        (source / name).write_bytes(data)
        if attack(capsys, "rotate", source, target) == 0:
            shutil.rmtree(target)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
