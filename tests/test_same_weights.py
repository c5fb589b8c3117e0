"""Rotated weights are a promise: the same bytes in every version of this project.

``zoo/digests.json`` was written by 0.1.0 (``python tests/test_same_weights.py``). A family whose
unrotated weights are not those of then, since transformers lays them out in another way, is
skipped; a rotation that was refused then is left out.
"""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from zoo import FAMILIES, build

import fastrot

FILE = Path(__file__).parent / "zoo" / "digests.json"
ROTATIONS = ("R1", "R2", "R3", "R4")
KINDS = ("hadamard", "random-hadamard")


def digest(model):
    """Of all parameters by name, in their order."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        data = parameter.detach().contiguous().view(torch.uint8)
        total.update(f"{name} {tuple(parameter.shape)}".encode())
        total.update(data.numpy().tobytes())
    return total.hexdigest()[:16]


def digests(name, kinds=KINDS, rotations=ROTATIONS):
    """The digest of a family unrotated, and after each kind of all rotations that it allows."""
    model = build(FAMILIES[name], torch.bfloat16 if name == "llama" else torch.float32)
    found = {"unrotated": digest(model)}
    for kind in kinds:
        rotated = copy.deepcopy(model)
        done = []
        for rotation in rotations:
            try:
                fastrot.apply(rotated, rotation, transform_type=kind, undo="none", seed=7)
            except fastrot.UnsupportedRotationError:
                continue
            done.append(rotation)
            found[f"{kind} {'+'.join(done)}"] = digest(rotated)
    return found


def check(name, kinds):
    expected = json.loads(FILE.read_text()).get(name)
    if expected is None:
        pytest.skip("a younger family")
    # The last is that of all; one that was refused when it was written is left out.
    most = [*expected][-1].split()[-1]
    found = digests(name, kinds, most.split("+"))
    if found["unrotated"] != expected["unrotated"]:
        pytest.skip("transformers lays this family out in another way")
    assert found == {
        key: value for key, value in expected.items() if key.split()[0] in ("unrotated", *kinds)
    }
    assert len(found) > len(kinds)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_weights(name):
    """The kinds, which differ in signs only, take turns."""
    check(name, KINDS[list(FAMILIES).index(name) % 2 :][:1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAMILIES)
def test_same_weights_of_every_kind(name):
    check(name, KINDS)


def test_most_families_are_compared():
    """The skips above are exceptions."""
    expected = json.loads(FILE.read_text())
    model = build(FAMILIES["qwen2"], torch.float32)
    assert digest(model) == expected["qwen2"]["unrotated"]
    assert len(expected) >= 130


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: digests(name) for name in FAMILIES}, indent=1) + "\n")
