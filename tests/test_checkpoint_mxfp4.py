"""Checkpoints in mxfp4, as gpt-oss: rotated with one rounding, saved in 16 bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config
from zoo import FAMILIES, build

import fastrot
from fastrot.checkpoint import mxfp4
from fastrot.checkpoint.header import read_header
from fastrot.checkpoint.job import prepare
from fastrot.checkpoint.shallow import verify_first_layers
from fastrot.checkpoint.verify import verify_checkpoint
from fastrot.cli import main

ALL = fastrot.Recipe(("R1", "R2", "R3", "R4"), transform_type="random-hadamard")
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of an mxfp4 checkpoint in two files, and the model as transformers reads it."""
    folder = tmp_path / "source"
    model = build(FAMILIES["gpt_oss"], torch.bfloat16, **SIZES)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(0)
    parts = {"a.safetensors": weights, "b.safetensors": {}}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        codes = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        weights[f"{name}_blocks"] = codes
        scales = torch.randint(118, 125, shape, generator=generator, dtype=torch.uint8)
        parts["b.safetensors"][f"{name}_scales"] = scales
    for file, tensors in parts.items():
        save_file(tensors, folder / file, {"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settle(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])
    return folder


def settle(folder, **quantization):
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(settings))


def exact(folder):
    """What transformers makes of the codes, which fits into its 16 bits."""
    plain = Mxfp4Config(dequantize=True)
    model = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=plain, dtype=torch.bfloat16
    )
    other = GptOssForCausalLM(model.config).double().eval()
    other.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    return other


def written(folder):
    return {n: w for file in folder.glob("*.safetensors") for n, w in load_file(file).items()}


def experts_of(tensors):
    return [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]


@pytest.mark.parametrize("chunk", [mxfp4.CHUNK, 100])
def test_one_rounding(chunk, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(mxfp4, "CHUNK", chunk)
    target = tmp_path / "target"
    fastrot.rotate_checkpoint(checkpoint, target, ALL)
    once, model = written(target), exact(checkpoint)
    fastrot.apply(model, ALL)
    ideal = model.state_dict()
    assert once.keys() == ideal.keys()
    assert len(experts_of(ideal)) == 2 * model.config.num_hidden_layers
    for name, weight in ideal.items():
        assert (once[name] != weight.to(once[name].dtype)).double().mean() < 1e-3, name
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {"quant_method": "fastrot"}
    assert verify_checkpoint(checkpoint, target)
    logits = verify_first_layers(checkpoint, target)
    assert logits, str(logits)


def test_numbers_without_a_rotation_are_those_of_transformers(checkpoint, tmp_path):
    """R2 leaves experts alone: every number is what transformers reads, bit for bit."""
    target = tmp_path / "target"
    fastrot.rotate_checkpoint(checkpoint, target, fastrot.Recipe(("R2",)), dtype=torch.float32)
    once, ideal = written(target), exact(checkpoint).state_dict()
    for name in experts_of(ideal):
        assert torch.equal(once[name].double(), ideal[name])


def test_every_code_and_exponent(tmp_path):
    """All finite exponents; the largest numbers do not fit into float32, as the format says."""
    exponents = torch.arange(255, dtype=torch.uint8).view(1, 255, 1)
    codes = torch.arange(256, dtype=torch.uint8)[:16].expand(1, 255, 1, 16).contiguous()
    file = tmp_path / "x.safetensors"
    save_file({"w_blocks": codes, "w_scales": exponents}, file)
    blocks = mxfp4.blocks_of(read_header(file)[0])["w"]
    out = torch.empty(blocks.numbers.shape)
    blocks.decode(codes, out, 0)
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    low = torch.stack([torch.cat([steps, -steps]), torch.zeros(16)], 1).flatten()
    ideal = (low[:, None] * 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)).float()
    assert torch.equal(out[0], ideal)


def test_files_of_scales_count_as_the_source(checkpoint):
    assert set(prepare(checkpoint, ALL).sources) == {"a.safetensors", "b.safetensors"}


def refused(folder, tmp_path, message):
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.rotate_checkpoint(folder, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damage_is_refused(checkpoint, tmp_path):
    scales = load_file(checkpoint / "b.safetensors")
    name = min(scales)
    whole = scales.pop(name)
    save_file({**scales, name: whole[:, :-1].contiguous()}, checkpoint / "b.safetensors")
    refused(checkpoint, tmp_path, f"{name} .*mxfp4 is")
    not_a_number = whole.clone()
    not_a_number[0, 0, 0] = 255
    save_file({**scales, name: not_a_number}, checkpoint / "b.safetensors")
    refused(checkpoint, tmp_path, "not finite")
    save_file(scales, checkpoint / "b.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    refused(checkpoint, tmp_path, f"{name} is missing")


def test_other_formats_are_refused_by_name(checkpoint, tmp_path):
    settle(checkpoint, quant_method="compressed-tensors", format="pack-quantized")
    refused(checkpoint, tmp_path, r"compressed-tensors, format=pack-quantized\).*fastrot\.apply")


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (torch.ones(4).to(torch.float8_e4m3fn), "extra is torch.float8_e4m3fn"),
        (None, "plain numbers and in mxfp4"),
    ],
)
def test_other_numbers_beside_it_are_refused(extra, problem, checkpoint, tmp_path):
    index = checkpoint / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    names = [n for n in listed["weight_map"] if n.endswith("_blocks")]
    name = "extra" if extra is not None else names[0].removesuffix("_blocks")
    save_file({name: torch.ones(4) if extra is None else extra}, checkpoint / "c.safetensors")
    listed["weight_map"][name] = "c.safetensors"
    index.write_text(json.dumps(listed))
    refused(checkpoint, tmp_path, problem)


def test_the_command_plans_what_it_rotates(checkpoint, capsys):
    assert main(["plan", str(checkpoint), "--rotations", "R1", "R4"]) == 0
    assert "R4" in capsys.readouterr().out
