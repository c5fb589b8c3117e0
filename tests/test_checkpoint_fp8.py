"""Checkpoints in fp8 with scales of blocks: rotated with one rounding, saved in 16 bits."""

import json

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file
from zoo import FAMILIES, build

import fastrot
from fastrot.checkpoint.shallow import verify_first_layers
from fastrot.checkpoint.verify import verify_checkpoint
from fastrot.cli.checkpoint import load

BLOCK = (32, 16)
ALL = fastrot.Recipe(("R1", "R2", "R3", "R4"), transform_type="random-hadamard")


def quantize(weight):
    """Codes and factors, as DeepSeek-V3 has them; the last blocks are cut."""
    rows, cols = BLOCK
    high, wide = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
    padded = torch.zeros(high * rows, wide * cols)
    padded[: len(weight), : weight.shape[1]] = weight.float()
    blocks = padded.view(high, rows, wide, cols)
    factors = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / factors[:, None, :, None]).view_as(padded)[: len(weight), : weight.shape[1]]
    return codes.to(torch.float8_e4m3fn), factors


def numbers(codes, factors):
    high = factors.double().repeat_interleave(BLOCK[0], 0)[: len(codes)]
    return codes.double() * high.repeat_interleave(BLOCK[1], 1)[:, : codes.shape[1]]


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of an fp8 checkpoint, its exact numbers, and a model that holds them."""
    model = tiny("llama", layers=2, hidden=80, heads=5, kv_heads=5)
    folder, exact = written(model, tmp_path)
    model = model.double()
    model.load_state_dict(exact)
    return folder, exact, model


def written(model, tmp_path):
    """The folder of a model's fp8 checkpoint, and its exact numbers."""
    folder = tmp_path / "source"
    model.bfloat16().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    exact = {}
    for name, weight in [*weights.items()]:
        if name.endswith(("proj.weight", "proj_with_mqa.weight")):
            codes, factors = quantize(weight)
            weights[name], weights[f"{name}_scale_inv"] = codes, factors
            exact[name] = numbers(codes, factors)
        else:
            exact[name] = weight.double()
    scales = {name: weights.pop(name) for name in [*weights] if name.endswith("_inv")}
    parts = {"a.safetensors": weights, "b.safetensors": scales}  # scales may lie in another file
    for file, tensors in parts.items():
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settle(folder, quant_method="fp8", weight_block_size=list(BLOCK), activation_scheme="dynamic")
    return folder, exact


def settle(folder, **quantization):
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization})
    )


@pytest.mark.parametrize("memory", [None, 2 << 20])
def test_one_rounding(memory, checkpoint, tmp_path):
    folder, exact, model = checkpoint
    fastrot.rotate_checkpoint(folder, tmp_path / "target", ALL, memory=memory)
    once = {
        n: w for f in (tmp_path / "target").glob("*.safetensors") for n, w in load_file(f).items()
    }
    assert not [name for name in once if "scale" in name]
    twice = tiny("llama", layers=2, hidden=80, heads=5, kv_heads=5, dtype=torch.bfloat16)
    twice.load_state_dict({name: w.bfloat16() for name, w in exact.items()})
    fastrot.apply(model, ALL)
    fastrot.apply(twice, ALL)
    worst = 0.0
    for name, ideal in model.state_dict().items():
        assert once[name].dtype in (torch.bfloat16, torch.int8, torch.int64)
        if not name.endswith("proj.weight"):
            continue
        # The numbers enter in float32: a few of many are on the other side of a rounding.
        rounded = ideal.bfloat16()
        assert (once[name] != rounded).double().mean() < 1e-3
        error, more = (
            float((w.double() - ideal).norm() / ideal.norm())
            for w in (once[name], twice.state_dict()[name])
        )
        worst = max(worst, error)
        assert 1.3 * error < more
    assert worst < 1.7e-3
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {"quant_method": "fastrot"}
    loaded = load(tmp_path / "target", "float32")
    ids = torch.arange(3, 40)[None]
    got, expected = loaded(ids).logits, model(ids).logits
    assert (got - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("memory", [None, 2 << 20])
def test_latent_attention(memory, tmp_path):
    """DeepSeek-V3's form: R3 in the rows of the latent, experts one by one, one rounding."""
    model = build(FAMILIES["deepseek_v3"], torch.float32)
    folder, exact = written(model, tmp_path)
    model.double().save_pretrained(tmp_path / "exact")
    save_file(exact, tmp_path / "exact" / "model.safetensors", {"format": "pt"})
    model = type(model).from_pretrained(tmp_path / "exact", dtype=torch.float64)
    fastrot.rotate_checkpoint(folder, tmp_path / "target", ALL, memory=memory)
    once = {
        n: w for f in (tmp_path / "target").glob("*.safetensors") for n, w in load_file(f).items()
    }
    fastrot.apply(model, ALL)
    model.save_pretrained(tmp_path / "ideal")
    ideal = load_file(tmp_path / "ideal" / "model.safetensors")
    turned = [name for name in ideal if "kv_a_proj_with_mqa" in name or "experts.0." in name]
    assert len(turned) > 6
    assert once.keys() == ideal.keys()
    for name, weight in ideal.items():
        assert (once[name] != weight.to(once[name].dtype)).double().mean() < 1e-3, name
    assert verify_checkpoint(folder, tmp_path / "target")
    logits = verify_first_layers(folder, tmp_path / "target")
    assert logits, str(logits)


def test_the_scales_count_for_logits(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    fastrot.rotate_checkpoint(folder, tmp_path / "target", ALL)
    logits = verify_first_layers(folder, tmp_path / "target", 1)
    assert logits, str(logits)
    scales = load_file(folder / "b.safetensors")
    scales["model.layers.0.mlp.down_proj.weight_scale_inv"] *= 2
    save_file(scales, folder / "b.safetensors", {"format": "pt"})
    assert not verify_first_layers(folder, tmp_path / "target", 1)


def test_a_dtype_of_choice(checkpoint, tmp_path):
    folder, _, model = checkpoint
    fastrot.rotate_checkpoint(folder, tmp_path / "target", dtype=torch.float32)
    fastrot.apply(model)
    got = load_file(tmp_path / "target" / "a.safetensors")
    for name, ideal in model.state_dict().items():
        assert torch.allclose(
            got[name].double(), ideal, rtol=0, atol=3e-7 * float(ideal.abs().max())
        )


def refused(folder, tmp_path, message):
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.rotate_checkpoint(folder, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_forms_are_refused(checkpoint, tmp_path):
    folder = checkpoint[0]
    settle(folder, quant_method="gptq", bits=4)
    refused(folder, tmp_path, "quant_method=gptq")
    settle(folder, quant_method="fp8", weight_block_size=None)
    refused(folder, tmp_path, "weight_block_size=None")
    settle(folder, quant_method="fp8", weight_block_size=[16, 16])
    refused(folder, tmp_path, r"_scale_inv is \(")
    settle(folder, quant_method="fp8", weight_block_size=[32, 16], activation_scheme="static")
    refused(folder, tmp_path, "activation_scheme='static'")


def test_a_weight_without_its_scales_is_refused(checkpoint, tmp_path):
    folder = checkpoint[0]
    scales = load_file(folder / "b.safetensors")
    name = next(iter(scales))
    del scales[name]
    save_file(scales, folder / "b.safetensors", {"format": "pt"})
    refused(folder, tmp_path, f"index.json names {name} .*which no file holds")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    refused(folder, tmp_path, f"{name} is missing")


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_drafts_keep_their_numbers(dtype, checkpoint, tmp_path):
    """Their codes mean nothing without the scales, which the new checkpoint does not have."""
    folder = checkpoint[0]
    codes, factors = quantize(torch.randn(80, 80))
    name = "model.layers.2.mlp.up_proj.weight"
    weights = load_file(folder / "a.safetensors") | {name: codes, f"{name}_scale_inv": factors}
    save_file(weights, folder / "a.safetensors", {"format": "pt"})
    fastrot.rotate_checkpoint(folder, tmp_path / "target", fastrot.Recipe(("R2",)), dtype=dtype)
    got = load_file(tmp_path / "target" / "a.safetensors")
    wanted = dtype or torch.bfloat16
    assert torch.equal(got[name], numbers(codes, factors).float().to(wanted))
    assert verify_checkpoint(folder, tmp_path / "target")
