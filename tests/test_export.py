"""What is exported for vLLM: the oracle multiplies as vLLM does, and compares with the original."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot.cli import main
from fastrot.integrations.marks import unmark
from fastrot.integrations.vllm.recorded import exported
from fastrot.record import online_sites
from fastrot.resolve import resolve_online
from fastrot.transform_config import parse_transform_config

SIZES = {"heads": 4, "head_dim": 32, "hidden": 128, "intermediate": 224, "mlp_bias": False}
RECIPES = {
    "kernel": {"rotations": ("R1", "R2", "R4"), "block_size": {"R4": 32}},
    "of 12 times a power of two": {"rotations": ("R4",), "block_size": {"R4": 56}},
    "signs of each layer": {
        "rotations": ("R2", "R4"),
        "transform_type": "random-hadamard",
        "randomize": True,
        "block_size": {"R4": 32},
        "seed": 3,
    },
    "dense": {"rotations": ("R4",), "transform_type": "random-matrix"},
}


def rotated(folder, recipe, **kwargs):
    model = tiny("llama", **(SIZES | kwargs))
    expected = logits(model, random_ids(model, 2, 9, seed=1))
    fastrot.apply(model, fastrot.Recipe(**recipe))
    model.save_pretrained(folder, max_shard_size="200KB")
    return model, expected


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def transforms_of(folder):
    return settings_of(folder)["quantization_config"]["transform_config"]["config_groups"]


def sylvester(order):
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def served_alone(folder, skip=()):
    """The model as a server without fastrot computes it, in float32."""
    tensors, config = tensors_of(folder), AutoConfig.from_pretrained(folder)
    unmark(config)
    del config.fastrot
    model = AutoModelForCausalLM.from_config(config).eval()
    names = {*model.state_dict()}
    model.load_state_dict({name: tensors.pop(name) for name in names if name in tensors})
    for name, module in model.named_modules():
        for group, scheme in transforms_of(folder).items():
            place = scheme["apply"][0]
            assert place["location"] == "input"
            if not any(re.match(t[3:], name) for t in place["targets"]):
                continue
            order = scheme["head_dim"]
            given = tensors.pop(f"{name}.{group}_input.weight", None)
            if name in skip:
                continue
            matrix = sylvester(order) if scheme["type"] == "hadamard" else given
            assert given is None or given.shape == (order, order)

            def rotate(module, args, matrix=matrix / order**0.5):
                return (args[0].unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)

            module.register_forward_pre_hook(rotate)
    assert not tensors
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_a_server_computes_the_original(name, tmp_path):
    model, expected = rotated(tmp_path / "rotated", RECIPES[name])
    fastrot.export(tmp_path / "rotated", tmp_path / "out")
    ids = random_ids(model, 2, 9, seed=1)
    assert relative_error(logits(served_alone(tmp_path / "out"), ids), expected) < 1e-5
    less = served_alone(tmp_path / "out", skip=["model.layers.1.mlp.down_proj"])
    assert relative_error(logits(less, ids), expected) > 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_copied_and_operands_left_out(name, tmp_path):
    rotated(tmp_path / "rotated", RECIPES[name])
    schemes = fastrot.export(tmp_path / "rotated", tmp_path / "out")
    old, new = tensors_of(tmp_path / "rotated"), tensors_of(tmp_path / "out")
    kept = {key for key in old if "fastrot" not in key}
    added = {key for scheme in schemes for key in scheme.tensors(torch.float32)}
    assert {*new} == kept | added
    assert all(torch.equal(new[key], old[key]) for key in kept)
    types = {scheme["type"] for scheme in transforms_of(tmp_path / "out").values()}
    kinds = {"kernel": "hadamard", "dense": "random-matrix"}
    assert types == {kinds.get(name, "random-hadamard")}
    assert len(added) == (1 if name == "kernel" else 2)
    places = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*places["weight_map"]} == {*new}


def test_the_importer_reads_the_same_rotation(tmp_path):
    model, _ = rotated(tmp_path / "rotated", RECIPES["kernel"])
    fastrot.export(tmp_path / "rotated", tmp_path / "out")
    written = parse_transform_config(
        settings_of(tmp_path / "out")["quantization_config"]["transform_config"]
    )
    read, recorded = resolve_online(model, written, seed=0), online_sites(model)
    assert len(read) == len(recorded) == 2
    for mine, theirs in zip(read, recorded, strict=True):
        assert (mine.module, mine.location, mine.inverse) == (
            theirs.module,
            theirs.location,
            theirs.inverse,
        )
        assert torch.equal(mine.rotation.matrix(), theirs.rotation.matrix())
    # And the weights as it would write them: those of the rotated checkpoint.
    plain = tiny("llama", **SIZES)
    fastrot.apply(plain, fastrot.Recipe(rotations=("R1", "R2")))
    fastrot.apply(plain, fastrot.Recipe(transform_config=written))
    ids = random_ids(model, 2, 9, seed=1)
    assert relative_error(logits(plain, ids), logits(model, ids)) < 1e-5


def test_the_matrix_has_the_dtype_of_the_model(tmp_path):
    rotated(tmp_path / "rotated", RECIPES["signs of each layer"], dtype=torch.bfloat16)
    fastrot.export(tmp_path / "rotated", tmp_path / "out")
    found = [v for k, v in tensors_of(tmp_path / "out").items() if k.endswith("_input.weight")]
    assert {matrix.dtype for matrix in found} == {torch.bfloat16}
    assert all((matrix.abs() == 1).all() for matrix in found)


def test_fastrot_knows_what_it_exported(tmp_path):
    model, expected = rotated(tmp_path / "rotated", RECIPES["signs of each layer"])
    fastrot.export(tmp_path / "rotated", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert exported(config, config.quantization_config)
    assert not exported(config, {"quant_method": "compressed-tensors"})
    del config.quantization_config
    tensors = tensors_of(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_config(config).eval()
    loaded.load_state_dict({k: v for k, v in tensors.items() if "R4" not in k})
    ids = random_ids(model, 2, 9, seed=1)
    with pytest.raises(fastrot.RecordError, match="2 of the online rotations that its config"):
        loaded(ids)
    fastrot.restore(loaded)
    assert relative_error(logits(loaded, ids), expected) < 1e-5
    with pytest.raises(fastrot.RotationError, match="transform_config already"):
        fastrot.export(tmp_path / "out", tmp_path / "again")
    with pytest.raises(fastrot.RotationError, match="quant_method=compressed-tensors"):
        fastrot.rotate_checkpoint(tmp_path / "out", tmp_path / "again")


def test_what_was_quantized_since_keeps_its_description(tmp_path):
    rotated(tmp_path / "rotated", RECIPES["kernel"])
    file = tmp_path / "rotated" / "config.json"
    described = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["x"]}
    file.write_text(json.dumps(settings_of(file.parent) | {"quantization_config": described}))
    fastrot.export(file.parent, tmp_path / "out")
    found = settings_of(tmp_path / "out")["quantization_config"]
    assert found.pop("transform_config")["config_groups"].keys() == {"R4"}
    assert found == described


def quantized_otherwise(folder):
    rotated(folder, RECIPES["kernel"])
    changed = settings_of(folder) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(changed))


def experts(folder):
    model = build(FAMILIES["mixtral"], torch.float32)
    fastrot.apply(model, ("R4",))
    model.save_pretrained(folder)


REFUSED = {
    "R3": (lambda f: rotated(f, {"rotations": ("R3", "R4")}), "R3 is online .*rotate without R3"),
    "R1": (
        lambda f: rotated(f, {"rotations": ("R1", "R4"), "keep_head": True}),
        "R1 is online .*or without keep_head",
    ),
    "own": (
        lambda f: rotated(
            f,
            {
                "transform_config": {
                    "config_groups": {
                        "mine": {
                            "type": "hadamard",
                            "apply": [
                                {"targets": ["re:.*o_proj$"], "location": "input"},
                                {
                                    "targets": ["re:.*o_proj$"],
                                    "location": "weight_input",
                                    "inverse": True,
                                },
                            ],
                        }
                    }
                }
            },
        ),
        "mine is online .*rotate without mine",
    ),
    "bias": (lambda f: rotated(f, RECIPES["kernel"], mlp_bias=True), "down_proj has a bias"),
    "experts": (experts, "belongs to experts"),
    "fused": (lambda f: rotated(f, {"rotations": ("R1", "R2")}), "vLLM serves it as it is"),
    "plain": (lambda f: tiny("llama").save_pretrained(f), "was not rotated by fastrot"),
    "quantized": (quantized_otherwise, "quant_method gptq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name, tmp_path):
    make, message = REFUSED[name]
    make(tmp_path / "source")
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.export(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    rotated(tmp_path / "source", RECIPES["dense"])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastrot.checkpoint.pipeline._write_at", full)
    with pytest.raises(OSError, match="No space left"):
        fastrot.export(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_on_the_command_line(tmp_path, capsys):
    rotated(tmp_path / "source", RECIPES["kernel"])
    call = ["export", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "vllm"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "R4: hadamard 7x32, 2 layers, by vLLM's kernel" in said
    before = Path(tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert main(call) == 0  # the same again finds it done
    assert Path(tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    assert main([*call[:-1], "sglang"]) == 2
    with pytest.raises(fastrot.RotationError, match="to='sglang' is not one of vllm"):
        fastrot.export(tmp_path / "source", tmp_path / "other", to="sglang")
