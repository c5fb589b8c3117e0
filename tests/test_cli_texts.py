"""The windows that commands cut of a text: no longer than a model reads, of ids that it knows."""

import pytest
import torch
from helpers import word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from fastrot.cli import commands, main
from fastrot.cli.texts import CONTEXT, windows_of

LONGEST = 16


@pytest.fixture
def folder(tmp_path):
    """Of a model that can't read more than it has places for."""
    config = GPT2Config(vocab_size=64, n_positions=LONGEST, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    numbers = torch.randint(3, 64, (2000,), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{number}" for number in numbers))
    return file


def test_a_window_is_what_a_model_reads(folder, text):
    assert windows_of(folder, [text], 1024, 8).shape[1] == LONGEST
    assert windows_of(folder, [text], 64, 8).shape == (8, 8 + 1)
    assert CONTEXT > LONGEST


@pytest.mark.parametrize("command", ["report", "learn"])
def test_commands_run_whole_windows(command, folder, text, tmp_path, capsys):
    options = {
        "report": ("--scheme", "a4", "--rotations", "none", "--out", str(tmp_path / "out")),
        "learn": (str(tmp_path / "out"), "--scheme", "a4", "--rotations", "R1", "--steps", "2"),
    }[command]
    status = main([command, str(folder), *options, "--text", str(text), "--tokens", "1024"])
    assert (status, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize("command", ["report", "learn"])
def test_a_tokenizer_of_another_model(command, folder, text, tmp_path, capsys):
    word_tokenizer(80).save_pretrained(folder)
    text.write_text(text.read_text() + " w70" * 20)
    out = ["--out", str(tmp_path / "out")] if command == "report" else [str(tmp_path / "out")]
    assert main([command, str(folder), *out, "--text", str(text), "--tokens", "1024"]) == 2
    error = capsys.readouterr().err
    assert f"the tokenizer of {folder} has the token id 70, and the model's vocabulary has" in error
    assert "the ids 0 to 63" in error


def test_an_index_that_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def fails(_):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(commands, "architectures", fails)
    assert main(["architectures"]) == 2
    assert capsys.readouterr().err == "fastrot: error: index out of range in self\n"
