"""A run that was stopped goes on from its file, to the bit where it would have come to."""

import copy
import errno
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import random_ids, tiny
from safetensors.torch import save_file

import fastrot
from fastrot.learning import descents
from fastrot.learning.kept import Kept

OPTIONS = {"scheme": "w4a4kv4", "steps": 10, "refine": 12, "vectors": 32}


@pytest.fixture(scope="module")
def model():
    made = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        made.get_input_embeddings().weight[:, 5] *= 20
    return made


@pytest.fixture(scope="module")
def text(model):
    return random_ids(model, 16, 16, seed=3)


@pytest.fixture(scope="module")
def whole(model, text):
    return fastrot.learn(model, text, **OPTIONS)


def stopping(function, after):
    """The function, but its call of this number and all later ones are an interrupt."""
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    stopped.calls = calls
    return stopped


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_stopped_between_descents(model, text, whole, after, tmp_path, monkeypatch):
    file = tmp_path / "run.part"
    with monkeypatch.context() as patch:
        patch.setattr(descents, "descend", stopping(descents.descend, after))
        with pytest.raises(KeyboardInterrupt):
            fastrot.learn(model, text, keep=file, **OPTIONS)
    assert [*tmp_path.iterdir()] == ([file] if after else [])
    counted = stopping(descents.descend, 99)
    monkeypatch.setattr(descents, "descend", counted)
    again = fastrot.learn(model, text, keep=file, **OPTIONS)
    first = 1 + 2 + 2  # R1, R2 and R3 of two layers
    assert len(counted.calls) == first - min(after, first) + 1
    assert again == whole
    assert again.history == whole.history
    assert [*tmp_path.iterdir()] == [file]


def test_stopped_in_the_second_descent(model, text, whole, tmp_path, monkeypatch):
    file = tmp_path / "run.part"
    turn = descents.Walk.turn
    # 10 steps of R1 and 2 of each of the others, then all five in each of 11 steps.
    with monkeypatch.context() as patch:
        patch.setattr(descents.Walk, "turn", stopping(turn, 10 + 4 * 2 + 5 * 11))
        with pytest.raises(KeyboardInterrupt):
            fastrot.learn(model, text, keep=file, **OPTIONS)
    counted = stopping(turn, 999)
    monkeypatch.setattr(descents.Walk, "turn", counted)
    monkeypatch.setattr(descents, "capture", lambda *_: pytest.fail("nothing is left to fit"))
    again = fastrot.learn(model, text, keep=file, **OPTIONS)
    assert len(counted.calls) == 5 * (12 - descents.KEPT_EVERY)
    assert again == whole
    assert again.history == whole.history


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 11},
        {"refine": 13},
        {"vectors": 33},
        {"scheme": "a4"},
        {"seed": 1},
        {"rotations": ("R1", "R2")},
        {"flipped": True},
        {"model": "other weights"},
        {"model": "channels in another order"},
        {"model": "another epsilon"},
        {"windows": (32, 8)},
        {"heldout": True},
    ],
    ids=str,
)
def test_another_run_is_refused(change, model, text, tmp_path, monkeypatch):
    file = tmp_path / "run.part"
    with monkeypatch.context() as patch:
        patch.setattr(descents, "descend", stopping(descents.descend, 1))
        with pytest.raises(KeyboardInterrupt):
            fastrot.learn(model, text, keep=file, **OPTIONS)
    before = file.read_bytes()
    options = OPTIONS | change
    changed = options.pop("model", None)
    model = copy.deepcopy(model)
    if changed == "other weights":
        model.model.norm.weight.data[0] += 1
    if changed == "channels in another order":
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data = weight.data.flip(1)
    if changed == "another epsilon":
        model.config.rms_norm_eps *= 2
    text = text.view(options.pop("windows", text.shape))
    if options.pop("heldout", False):
        options["heldout"] = random_ids(model, 8, 16, seed=4)
    if options.pop("flipped", False):
        text = text.flip(0)
    with pytest.raises(fastrot.RotationError, match="another model, text, recipe or option"):
        fastrot.learn(model, text, keep=file, **options)
    assert file.read_bytes() == before


def test_files_that_no_run_kept(model, text, tmp_path):
    file = tmp_path / "run.part"
    file.write_bytes(b"none of ours")
    with pytest.raises(fastrot.RotationError, match=r"run\.part was not kept by a run.*remove it"):
        fastrot.learn(model, text, keep=file, **OPTIONS)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(fastrot.RotationError, match="another model, text"):
        fastrot.learn(model, text, keep=file, **OPTIONS)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ({"scheme": "w4g100"}, "100"),
        ({"rotations": ("R1",), "block_size": 7}, "7"),
        ({"rotations": ("R4",), "permute": True}, "one block"),
    ],
    ids=str,
)
def test_a_refusal_leaves_no_file(refused, message, model, text, tmp_path):
    file = tmp_path / "run.part"
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.learn(model, text, keep=file, **OPTIONS | refused)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk(tmp_path, monkeypatch):
    """What was kept stays, nothing else is left, and the error names the file."""
    file = tmp_path / "run.part"
    kept = Kept(file, "run")
    kept.put("a", {"x": torch.ones(2)})
    before = file.read_bytes()

    def full(path, content):
        with path.open("wb") as opened:
            opened.write(content[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"No space left on device: '{re.escape(str(file))}'$"):
        kept.put("b", {"x": torch.ones(2)})
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_bytes() == before


def test_files_that_can_not_be_written(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(descents, "capture", lambda *_: pytest.fail("it was too late"))
    with pytest.raises(FileNotFoundError, match=r"missing/run\.part'$"):
        fastrot.learn(model, text, keep=tmp_path / "missing" / "run.part", **OPTIONS)
    with pytest.raises(fastrot.RotationError, match="is a folder; name a file"):
        fastrot.learn(model, text, keep=tmp_path, **OPTIONS)


def test_sets_by_their_names(tmp_path):
    file = tmp_path / "sets"
    kept = Kept(file, "run")
    assert kept.get("a") is None
    kept.put("a", {"x": torch.ones(2), "y": torch.zeros(3)})
    kept.put("ab", {"x": torch.ones(1)})
    kept.put("a", {"x": torch.zeros(2)})
    again = Kept(file, "run")
    assert {name: t.tolist() for name, t in again.get("a").items()} == {"x": [0, 0], "y": [0, 0, 0]}
    assert again.get("ab").keys() == {"x"}
