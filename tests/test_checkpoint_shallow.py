"""``fastrot verify`` by the logits of first layers: what it passes, finds, reads and leaves out."""

import json
import shutil

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file
from zoo import FAMILIES, build

import fastrot
from fastrot.checkpoint import shallow
from fastrot.checkpoint.available import available
from fastrot.checkpoint.header import CheckpointError
from fastrot.checkpoint.shallow import NotComparedError, median_error, verify_first_layers
from fastrot.checkpoint.verify import TensorVerification
from fastrot.cli import main
from fastrot.cli import verify as command
from fastrot.cli.checkpoint import load
from fastrot.mapping import ROTATIONS
from fastrot.mapping.tables import find_architecture
from fastrot.record import without_groups
from fastrot.verification import random_prompts

IDS = torch.arange(3, 40)[None]

STACKS = {
    "qwen3": "model.layers",
    "qwen3_moe": "model.layers",
    "deepseek_v3": "model.layers",  # a dense layer, then experts; latent attention
    "gemma3_text": "model.layers",  # kinds of attention by layer; R1 online behind norms
    "gemma3n_text": "model.layers",  # sizes by the number of layers; keys of other layers
    "gemma3": "model.language_model.layers",
    "qwen2_5_vl": "model.language_model.layers",
    "gpt2": "transformer.h",
}
"""Where the layers of families are."""


def rotated(model, folder, **options):
    """Source and target of a rotation by all that the model takes."""
    model.save_pretrained(folder / "source")
    rotations = [r for r in ROTATIONS if r not in find_architecture(model.config).refuses]
    recipe = fastrot.Recipe(rotations, transform_type="random-hadamard", seed=3, **options)
    fastrot.rotate_checkpoint(folder / "source", folder / "target", recipe)
    return folder / "source", folder / "target"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model = tiny("llama", dtype=torch.bfloat16, tied=True, layers=3)
    return rotated(model, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def spoilt(pair, tmp_path):
    """The error of a copy of the rotated checkpoint in which something was changed."""

    def change(edit, layers=1):
        target = tmp_path / "changed"
        shutil.copytree(pair[1], target)
        weights = load_file(target / "model.safetensors")
        edit(weights)
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        return verify_first_layers(pair[0], target, layers)

    return change


def reference(folder, stack, layers):
    """The logits of the loaded model, whose list of layers is cut then."""
    model = load(folder, "float32").float()  # older transformers leave parts in the file's dtype
    owner, _, name = stack.rpartition(".")
    place = model.get_submodule(owner)
    setattr(place, name, getattr(place, name)[:layers])
    return model(IDS, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in STACKS if name in FAMILIES])
def test_the_model_is_the_loaded_one_cut(name, tmp_path):
    """Number by number, before and after the rotation; and the two agree."""
    model = build(FAMILIES[name], torch.bfloat16)
    folders = rotated(model, tmp_path)
    for folder in folders:
        for layers in (1, 2):
            got = shallow._Cut(folder, layers).filled()(IDS, use_cache=False).logits
            expected = reference(folder, STACKS[name], layers)
            assert (got - expected).norm() <= 1e-6 * expected.norm()
    result = verify_first_layers(*folders)
    assert result, str(result)
    assert 2**-12 < result.error < result.tolerance < 0.1


def test_float32_is_held_to_its_arithmetic(tmp_path):
    folders = rotated(tiny("qwen2", layers=3), tmp_path, keep_head=True)
    result = verify_first_layers(*folders, 1)
    assert 0 < result.error < 2e-6
    assert result.tolerance <= 2e-5


@pytest.fixture
def seen(monkeypatch):
    """The names of the tensors that are read."""
    names = []
    read = shallow.read_entry
    monkeypatch.setattr(shallow, "read_entry", lambda e: names.append(e.name) or read(e))
    return names


def test_only_what_is_needed_is_read(pair, seen):
    assert verify_first_layers(*pair, 2)
    assert not [name for name in seen if "layers.2." in name]
    ours = [n for file in pair[1].glob("*.safetensors") for n in load_file(file)]
    theirs = [*load_file(pair[0] / "model.safetensors")]
    assert sorted(seen) == sorted(n for n in (*ours, *theirs) if "layers.2." not in n)


def test_matrices_by_layer(tmp_path):
    """The record has a list of digests as long as the whole model."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 112, 112, generator=generator, dtype=torch.float64)
    folders = rotated(
        tiny("llama", dtype=torch.bfloat16, layers=3),
        tmp_path,
        matrices={"R4": [*torch.linalg.qr(noise).Q]},
    )
    result = verify_first_layers(*folders)
    assert result, str(result)


def test_what_sees_is_not_read(seen, tmp_path):
    assert verify_first_layers(*rotated(build(FAMILIES["qwen2_5_vl"], torch.bfloat16), tmp_path), 1)
    assert any("embed_tokens" in name for name in seen)
    assert not [name for name in seen if "visual" in name]


def test_operands_of_version_0_1_0_are_read(spoilt):
    def rename(weights):
        for name in [name for name in weights if "fastrot_down_proj_input" in name]:
            old = name.replace("fastrot_down_proj_input", "down_proj.fastrot_input")
            weights[old] = weights.pop(name)

    assert spoilt(rename)


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w["model.layers.0.mlp.down_proj.weight"].neg_(),
        lambda w: w["model.layers.0.self_attn.v_proj.weight"].copy_(
            w["model.layers.0.self_attn.k_proj.weight"]
        ),
        lambda w: w["model.embed_tokens.weight"].copy_(w["model.embed_tokens.weight"].roll(1, 1)),
        lambda w: w["model.norm.weight"].mul_(1.25).sub_(torch.arange(96) / 192),
        lambda w: w["model.layers.0.input_layernorm.weight"].mul_(1.25),
        lambda w: w["lm_head.weight"].fill_(torch.nan),
        lambda w: w["model.layers.0.mlp.fastrot_down_proj_input.operand"][:3].neg_(),
    ],
)
def test_a_change_is_found(edit, spoilt):
    result = spoilt(edit)
    assert not result
    assert "FAILED: not the same function" in str(result)
    assert (
        f"{result.error:.2e} in the median of positions, tolerance {result.tolerance:.2e}"
        in str(result)
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_counts_as_far_as_it_is_compared(layers, spoilt):
    result = spoilt(lambda w: w["model.layers.1.mlp.up_proj.weight"].neg_(), layers)
    assert bool(result) == (layers == 1)


def test_a_lost_weight_is_named(spoilt):
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        spoilt(lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))


def forget(folder, group):
    """Take a rotation out of the record, in the format that has no checksum."""
    config = json.loads((folder / "config.json").read_text())
    record = {"format": 1, "applied": config["fastrot"]["applied"]}
    made = type("Config", (), {"fastrot": record})
    config["fastrot"] = without_groups(made, [group]) | {"format": 1}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("group", "same"),
    [
        ("R4", False),  # online, against what is in the down projection
        ("R3", True),  # turns queries and keys alike: the record that lost it is another, not wrong
    ],
)
def test_online_rotations_are_those_of_the_record(group, same, pair, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(pair[1], target)
    forget(target, group)
    result = verify_first_layers(pair[0], target)
    assert bool(result) == same
    assert same or result.error > 0.1
    assert main(["verify", str(pair[0]), str(target)]) == 1


def test_r1_online_counts(tmp_path):
    """Gemma's norms write into the stream, where R1 acts online."""
    source, target = rotated(build(FAMILIES["gemma3_text"], torch.bfloat16), tmp_path)
    config = json.loads((target / "config.json").read_text())
    assert "R1" in config["fastrot"]["applied"][0]["transform_config"]["config_groups"]
    forget(target, "R1")
    assert not verify_first_layers(source, target)


def test_the_median_forgives_few_positions():
    expected = [torch.ones(2, 64, 8)]
    some, most, none = (expected[0] * (1 + 1e-3) for _ in range(3))
    some[0, :60], most[0], most[1, 0], none[1, 3] = -1, -1, -1, torch.nan
    assert median_error([some], expected) == pytest.approx(1e-3, rel=1e-3)
    assert median_error([most], expected) == 2
    assert not median_error([none], expected) <= 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("longcat_flash", "has no list of 4 decoder layers"),
        ("idefics", "does not run on 2 layers .ValueError: Exactly 1 of pixel_values"),
    ],
)
def test_what_can_not_be_compared_says_so(name, why, tmp_path, capsys):
    source = build(FAMILIES[name], torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", fastrot.Recipe(("R2",)))
    with pytest.raises(NotComparedError, match=why):
        verify_first_layers(tmp_path / "source", tmp_path / "target")
    assert main(["verify", str(tmp_path / "source"), str(tmp_path / "target")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("logits             not compared: ")
    assert lines[-1].endswith("; --full loads the whole models")


def test_what_does_not_fit_into_memory_is_not_tried(pair, tmp_path, monkeypatch):
    model = load(pair[0])
    weights = sum(w.numel() for w in model.parameters()) - sum(
        w.numel() for w in model.model.layers[2].parameters()
    )
    widest = max(w.numel() for w in model.parameters())
    enough = 4 * (weights + 2 * widest)
    monkeypatch.setattr(shallow, "available", lambda: enough)
    assert verify_first_layers(*pair)
    monkeypatch.setattr(shallow, "available", lambda: enough - 1)
    with pytest.raises(NotComparedError, match="take 1M in float32, and 1M of memory are free"):
        verify_first_layers(*pair)
    monkeypatch.setattr(shallow, "available", lambda: None)
    assert verify_first_layers(*pair)


def machine(root, cgroup, **files):
    """The files of a machine, as far as they tell of memory."""
    there = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n", "proc/self/cgroup": cgroup}
    for name, text in (there | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder, most, used, cache):
    return {
        f"sys/fs/cgroup/{folder}memory.max": most,
        f"sys/fs/cgroup/{folder}memory.current": used,
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


def test_memory_is_what_machine_and_groups_leave(tmp_path):
    assert available(tmp_path) is None
    assert available(machine(tmp_path / "a", "0::/\n")) == 8 << 10
    free = group("pod/", "max", "5", 0) | group("pod/one/", "7000", "3000", 500)
    assert available(machine(tmp_path / "b", "0::/pod/one\n", **free)) == 4500
    around = group("pod/", "4096", "96", 0) | group("pod/one/", "7000", "1000", 500)
    assert available(machine(tmp_path / "c", "0::/pod/one\n", **around)) == 4000
    # In a container its own group is at the top, whatever path the host calls it by.
    inside = group("", "2000", "2500", 100)
    assert available(machine(tmp_path / "d", "0::/host/of/it\n", **inside)) == 0
    first = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "6000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10\n",
    }
    assert available(machine(tmp_path / "e", "3:cpu:/x\n2:memory:/x\n0::/\n", **first)) == 5010


def test_the_command(pair, capsys, monkeypatch):
    folders = [*map(str, pair)]
    assert main(["verify", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "verified: the rotated source"
    assert lines[2] == "logits             behind the first 2 layers, computed in float32"
    result = verify_first_layers(*pair)
    assert lines[3:] == str(result).splitlines()[1:]
    assert main(["verify", *folders, "--layers", "1"]) == 0
    assert "behind the first layer, computed" in capsys.readouterr().out
    assert main(["verify", *folders, "--layers", "0"]) == 0
    assert "logits" not in capsys.readouterr().out
    assert main(["verify", *folders, "--full", "--layers", "1"]) == 2
    assert "--layers 1: --full and its options take all layers" in capsys.readouterr().err
    monkeypatch.setattr(command, "verify_checkpoint", lambda *_, **__: TensorVerification(1, 0, ()))
    other = [folders[1], folders[0]]  # the head is tied in one of them; the function is the same
    assert main(["verify", *other]) == 0


def test_the_command_fails_for_the_logits_alone(pair, tmp_path, capsys, monkeypatch):
    tiny("llama", layers=3, seed=1).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(command, "verify_checkpoint", lambda *_, **__: TensorVerification(1, 0, ()))
    assert main(["verify", str(pair[0]), str(tmp_path / "other")]) == 1
    out = capsys.readouterr().out
    assert "in the median of positions, tolerance" in out
    assert out.endswith("FAILED: not the same function\n")


def test_no_layers_are_no_comparison(pair):
    with pytest.raises(ValueError, match="layers=0"):
        verify_first_layers(*pair, 0)


def test_prompts_are_those_of_the_library(pair):
    """The same ids for the same seed; other ids, another figure."""
    first, second = (verify_first_layers(*pair, 1, seed=seed).error for seed in (0, 1))
    assert first == verify_first_layers(*pair, 1).error != second
    assert random_prompts(load(pair[0]), 0)[0].shape == (4, 64)


def test_a_median_over_logits_of_zero():
    some, nothing = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    one_of_three = some.clone()
    one_of_three[0, 0] = 0
    assert median_error([one_of_three], [one_of_three]) == 0
    assert median_error([some], [nothing]) == torch.inf
    assert median_error([1.5 * one_of_three], [one_of_three]) == 0.5


def test_the_layers_that_there_are_are_told(pair):
    assert "first 3 layers" in str(verify_first_layers(*pair, 99))
