"""``fastrot learn``, and what takes the file that it writes."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny, word_tokenizer
from transformers import AutoModelForCausalLM

import fastrot
from fastrot.cli import main
from fastrot.cli.arguments import parser
from fastrot.cli.commands import options_of
from fastrot.learning import descents
from fastrot.learning.learned import Learned
from fastrot.recipe import Recipe

OPTIONS = ("--steps", "10", "--tokens", "256")


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def words(file, seed):
    numbers = torch.randint(3, 64, (2200,), generator=torch.Generator().manual_seed(seed))
    file.write_text(" ".join(f"w{number}" for number in numbers))
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "source"
    tiny("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return words(tmp_path_factory.mktemp("texts") / "text.txt", seed=0)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """A recipe with matrices, whether they are better or not."""
    windows = random_ids(tiny("llama"), 16, 16, seed=0)
    model = AutoModelForCausalLM.from_pretrained(source)
    learned = fastrot.learn(model, windows, ("R1", "R2"), steps=5, vectors=16)
    q = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64)).Q
    path = tmp_path_factory.mktemp("recipes") / "R.safetensors"
    Learned(("R1", "R2"), matrices={"R1": q}, scheme=learned.scheme).save(path)
    return path


def test_learn_writes_a_recipe(source, text, tmp_path, capsys):
    out = tmp_path / "R.safetensors"
    options = ("--scheme", "w4a4", "--seed", 3, "--text", text, *OPTIONS)
    heldout = words(tmp_path / "heldout.txt", seed=1)
    options = (*options, "--heldout", heldout, "--refine", "2")
    status, printed, err = run(capsys, "learn", source, out, *options)
    assert (status, err) == (0, "")
    learned = Learned.load(out)
    assert learned.rotations == ("R1", "R2", "R3", "R4")
    assert (learned.scheme, learned.seed, learned.steps) == ("w4a4", 3, 10)
    assert len(learned.history) == 12
    assert printed.splitlines()[0] == str(learned)
    assert f"--learned {out}" in printed


def test_rotate_plan_and_verify_take_it(source, written, tmp_path, capsys):
    target = tmp_path / "target"
    status, _, err = run(capsys, "rotate", source, target, "--learned", written)
    assert (status, err) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = random_ids(model, 2, 8, seed=1)
    rotated = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert relative_error(logits(rotated, ids), logits(model, ids)) <= 1e-5
    recipe = Learned.load(written)
    plan = fastrot.apply(model, recipe).plan
    assert all(map(torch.equal, model.state_dict().values(), rotated.state_dict().values()))
    status, out, _ = run(capsys, "plan", source, "--learned", written)
    assert status == 0
    assert out.startswith(str(plan).splitlines()[0])
    status, out, _ = run(capsys, "verify", source, target, "--learned", written)
    assert status == 0, out
    status, _, err = run(capsys, "verify", source, target)
    assert status == 2
    assert "--learned FILE" in err
    other = tmp_path / "other.safetensors"
    Learned(("R1", "R2")).save(other)
    status, _, err = run(capsys, "verify", source, target, "--learned", other)
    assert status == 2
    assert "not that of the recipe" in err


def test_permutations_from_text_to_checkpoint(source, text, tmp_path, capsys):
    out, rotated = tmp_path / "R.safetensors", tmp_path / "rotated"
    options = ("--scheme", "a4", "--text", text, *OPTIONS, "--rotations", "R4", "--permute")
    status, _, err = run(capsys, "learn", source, out, *options, "--block-size", "R4=28")
    assert (status, err) == (0, "")
    learned = Learned.load(out)
    assert learned.block_size == {"R4": 28}
    order = torch.arange(112).flip(0)  # whatever the gate said, here is one
    replace(learned, permutations={"R4": order}).save(out)
    assert run(capsys, "rotate", source, rotated, "--learned", out)[0] == 0
    assert run(capsys, "verify", source, rotated, "--full")[0] == 0
    moved, before = (AutoModelForCausalLM.from_pretrained(f) for f in (rotated, source))
    gates = [m.model.layers[1].mlp.gate_proj.weight for m in (moved, before)]
    assert torch.equal(gates[0], gates[1].flip(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is there and no learned recipe"),
        ("words.txt", "words.txt is there and no learned recipe"),
        ("folder", "folder is a folder"),
        ("nowhere/R.safetensors", "there is no folder .*nowhere to write R.safetensors in"),
    ],
)
def test_what_is_not_written_over(name, message, source, text, tmp_path, capsys):
    """Before any time is spent; an earlier recipe may be replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "words.txt").write_text("mine")
    out = Path(shutil.copy(source / name, tmp_path)) if name[0] == "m" else tmp_path / name
    before = out.read_bytes() if out.is_file() else None
    status, _, err = run(capsys, "learn", source, out, "--scheme", "a4", "--text", text, *OPTIONS)
    assert status == 2
    assert re.search(message, err)
    assert before == (out.read_bytes() if out.is_file() else None)


def test_a_run_that_was_stopped_goes_on(source, text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "R.safetensors"
    command = ("learn", source, out, "--scheme", "a4", "--text", text, *OPTIONS)
    descend = descents.descend

    def once(*args):
        monkeypatch.setattr(descents, "descend", interrupted)
        return descend(*args)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(descents, "descend", once)
    assert run(capsys, *command)[0] == 130
    assert [f.name for f in tmp_path.iterdir()] == ["R.safetensors.part"]
    monkeypatch.setattr(descents, "descend", descend)
    status, _, err = run(capsys, *command, "--seed", 1)
    assert status == 2
    assert "R.safetensors.part was kept by a run with another" in err
    assert run(capsys, *command)[0] == 0
    assert [f.name for f in tmp_path.iterdir()] == ["R.safetensors"]


def test_the_corrected_command_runs(source, text, tmp_path, capsys):
    """96 elements have no groups of 100; the refusal leaves nothing in the way of groups of 16."""
    command = ("learn", source, tmp_path / "R.safetensors", "--text", text, *OPTIONS)
    status, _, err = run(capsys, *command, "--scheme", "w4g100")
    assert status == 2
    assert "100" in err
    assert [*tmp_path.iterdir()] == []
    assert run(capsys, *command, "--scheme", "w4g16", "--refine", "0")[0] == 0


def test_another_process_took_the_kept_file_away(source, text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "R.safetensors"
    save = Learned.save

    def saved(self, path):
        save(self, path)
        out.with_name(f"{out.name}.part").unlink()

    monkeypatch.setattr(Learned, "save", saved)
    command = ("learn", source, out, "--scheme", "a4", "--text", text, *OPTIONS)
    assert run(capsys, *command)[0] == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), None),
        (("--block-size", "32"), 32),
        (("--block-size", "r4=28"), {"R4": 28}),
        (("--block-size", "R4=28", "--block-size", "R1=32"), {"R4": 28, "R1": 32}),
    ],
)
def test_block_sizes(given, expected):
    options = options_of(parser().parse_args(["plan", "MODEL", *given]))
    assert Recipe(**options).block_size == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "{source}", "--block-size", "R4=0"), "'0' is not a positive integer"),
        (("plan", "{source}", "--block-size", "R9=8"), "block_size names 'R9', not one of"),
        (("plan", "{source}", "--block-size", "8", "--block-size", "R4=8"), "one size for all"),
        (("plan", "{source}", "--block-size", "8", "--block-size", "16"), "one size for all"),
        (
            ("learn", "{source}", "{new}", "--text", "{text}", "--permute"),
            "R4 (hadamard 112) has one block",
        ),
        (
            ("learn", "{source}", "{new}", "--text", "{text}", "--permute", "--block-size", "R4=9"),
            "does not divide",
        ),
        *(
            (
                ("rotate", "{source}", "{new}", "--learned", "{file}", *given),
                f"is a whole recipe; leave {given[0]} out",
            )
            for given in (
                ("--seed", "3"),
                ("--seed", "0"),
                ("--rotations", "R1", "R2"),
                ("--transform-type", "hadamard"),
                ("--spinquant", "{file}"),
            )
        ),
        (("rotate", "{source}", "{new}", "--learned", "{text}"), "no learned recipe"),
        (("rotate", "{source}", "{new}", "--learned", "{new}"), "No such file"),
        (("learn", "{source}", "{source}"), "is a folder"),
        (("learn", "{source}", "{new}", "--learned", "{file}"), "arguments: --learned"),
        (("learn", "{source}", "{new}", "--spinquant", "{file}"), "arguments: --spinquant"),
        (("demo", "--json", "{source}"), "is a folder"),
        (("learn", "{source}", "{new}/R.safetensors"), "new to write R.safetensors in"),
        (("learn", "{source}", "{new}", "--scheme", "w99"), "w99"),
        (("learn", "{source}", "{new}", "--rotations", "R4"), "none can be learned"),
        (
            ("learn", "{source}", "{new}", "--tokens", "16"),
            "--tokens 16 are too few for 32 windows",
        ),
        (
            ("learn", "{source}", "{new}", "--text", "{file}", "{text}", "--heldout", "{text}"),
            "text.txt is in --text and in --heldout",
        ),
        (
            ("learn", "{source}", "{new}", "--text", "{text}", "--tokens", "99999999"),
            "give more text",
        ),
    ],
)
def test_refusals(arguments, message, source, written, text, tmp_path, capsys):
    names = {"source": source, "new": tmp_path / "new", "file": written, "text": text}
    options = OPTIONS if arguments[0] == "learn" and "--tokens" not in arguments else ()
    status, _, err = run(capsys, *(a.format(**names) for a in arguments), *options)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
