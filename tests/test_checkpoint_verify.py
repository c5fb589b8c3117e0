"""``fastrot verify`` tensor by tensor: what it passes, and that it finds any change."""

import json
import re
import shutil

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file

import fastrot
from fastrot.checkpoint.verify import verify_checkpoint
from fastrot.cli import main
from fastrot.cli.checkpoint import load

ALL = fastrot.Recipe(("R1", "R2", "R3", "R4"), transform_type="random-hadamard", seed=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tiny("llama", dtype=torch.bfloat16, tied=True).save_pretrained(folder / "source")
    fastrot.rotate_checkpoint(folder / "source", folder / "target", ALL)
    return folder / "source", folder / "target"


@pytest.fixture
def spoilt(pair, tmp_path):
    """A copy of the rotated checkpoint that may be changed."""

    def change(edit):
        folder = tmp_path / "target"
        folder.mkdir()
        weights = load_file(pair[1] / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_bytes((pair[1] / "config.json").read_bytes())
        return verify_checkpoint(pair[0], folder)

    return change


def test_what_rotate_wrote_is_equal(pair, capsys):
    result = verify_checkpoint(*pair)
    assert result
    assert (result.rounded, result.problems) == (0, ())
    assert result.equal == len(load_file(pair[1] / "model.safetensors"))
    assert main(["verify", *map(str, pair)]) == 0
    assert "verified: the rotated source" in capsys.readouterr().out


def test_what_apply_and_save_wrote_is_right(pair, tmp_path):
    """In float32 arithmetic too, and in another dtype: then a few numbers are rounded otherwise."""
    model = load(pair[0])
    fastrot.apply(model, ("R1", "R2"), precision="float32")
    model.save_pretrained(tmp_path / "narrow")
    result = verify_checkpoint(pair[0], tmp_path / "narrow")
    assert result, str(result)
    model = load(pair[0], "float32")
    fastrot.apply(model, ALL)
    model.save_pretrained(tmp_path / "wide")
    result = verify_checkpoint(pair[0], tmp_path / "wide")
    assert result, str(result)


def test_every_tensor_is_looked_at(pair, spoilt, tmp_path):
    """One number of each is moved by four times the step of its dtype; all are found."""

    def nudge(weights):
        for weight in weights.values():
            flat = weight.view(-1)
            if weight.is_floating_point():
                place = int(flat.abs().argmax())
                flat[place] *= 1 + 4 * torch.finfo(weight.dtype).eps
            else:
                flat[0] = -flat[0]

    result = spoilt(nudge)
    assert not result
    assert (result.equal, result.rounded) == (0, 0)
    assert len(result.problems) == len(load_file(pair[1] / "model.safetensors"))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
)
def test_the_last_bit_of_what_is_copied_counts(name, tmp_path):
    """What nothing is done to has no rounding that another device may do otherwise."""
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", fastrot.Recipe("R2"))
    file = tmp_path / "target" / "model.safetensors"
    weights = load_file(file)
    weights[name].view(torch.int16).view(-1)[:5].bitwise_xor_(1)
    save_file(weights, file, {"format": "pt"})
    result = verify_checkpoint(tmp_path / "source", tmp_path / "target")
    assert result.problems == (f"{name}: 5 entries differ from the source, which is copied",)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda w: w.pop("lm_head.weight"), "lm_head.weight: missing"),
        (lambda w: w.update(extra=torch.ones(2)), "extra: is not of this rotation"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight: has shape \(3,\)",
        ),
        (
            lambda w: w["model.layers.0.mlp.down_proj.weight"].mul_(-1),
            "down_proj.weight: .* differ by more than rounding, at most",
        ),
        (
            lambda w: w["model.layers.0.mlp.down_proj.weight"][1].fill_(torch.nan),
            "down_proj.weight: 112 of",
        ),
    ],
)
def test_what_is_wrong_is_named(edit, problem, spoilt):
    result = spoilt(edit)
    assert not result
    assert len(result.problems) == 1
    assert re.search(problem, result.problems[0])


def test_the_record_counts(pair, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").write_bytes((pair[1] / "model.safetensors").read_bytes())
    config = json.loads((pair[1] / "config.json").read_text())
    config["fastrot"]["applied"][0]["seed"] = 4
    (target / "config.json").write_text(json.dumps(config))
    assert not verify_checkpoint(pair[0], target)
    assert main(["verify", str(pair[0]), str(target)]) == 1


def test_another_source_fails(pair, tmp_path):
    tiny("llama", dtype=torch.bfloat16, tied=True, seed=1).save_pretrained(tmp_path / "other")
    result = verify_checkpoint(tmp_path / "other", pair[1])
    assert len(result.problems) > 15
    assert "… and" in str(result)


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", 0.1), ("tie_word_embeddings", True), ("use_cache", False)]
)
def test_the_configuration_counts(name, value, pair, tmp_path):
    """The same tensors under other settings are another model; some settings are no matter."""
    target = tmp_path / "target"
    shutil.copytree(pair[1], target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {name: value, "dtype": "float32"}))
    result = verify_checkpoint(pair[0], target)
    assert bool(result) == (name == "use_cache")
    assert all(f"config.json: {name} is {value}, expected" in p for p in result.problems)
