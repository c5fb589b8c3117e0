"""`fastrot serve` is transformers' own command; `make test-serve` tries it over HTTP."""

import json
import sys
from urllib.request import Request, urlopen

import load
import pytest
import transformers.cli.transformers  # before the tests claim that a server is installed
from helpers import tiny, word_tokenizer
from transformers.utils.import_utils import is_serve_available

import fastrot
from fastrot.cli import main


def handed_over(monkeypatch, *arguments):
    seen = []
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    monkeypatch.setattr(transformers.cli.transformers, "app", lambda a, **_: seen.extend(a))
    assert main(["serve", *arguments]) == 0
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        ("FOLDER", "--port", "8001"),
        ("--continuous-batching", "FOLDER", "--attn-implementation", "eager"),
        ("--help",),
        ("--version", "-h"),
        (),
    ],
)
def test_all_arguments_are_handed_over(arguments, monkeypatch):
    assert handed_over(monkeypatch, *arguments) == ["serve", *arguments]


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", "FOLDER"]) == 2
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err


PROMPTS = ("w7 w9 w31", "w60 w12 w5 w5 w8", "w3")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A rotated checkpoint, and what its original answers."""
    folder = tmp_path_factory.mktemp("rotated")
    model, tokenizer, answers = tiny("llama"), word_tokenizer(), []
    loaded = load.answers(model, tokenizer)
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**asked, max_new_tokens=16, do_sample=False)[0]
        start = asked["input_ids"].shape[1]
        answers.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
    fastrot.apply(model, ("R1", "R2", "R3", "R4"), randomize=True)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    return str(folder), answers, loaded


def server(folder, *options):
    command = [sys.executable, "-m", "fastrot", "serve", folder, "--device", "cpu"]
    return load.serving(*command, *options)


def complete(address, folder, prompt):
    body = {"model": folder, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="make test-serve")
@pytest.mark.parametrize("batching", ["one by one", "continuous sdpa", "continuous eager"])
def test_answers_are_those_of_the_original(batching, served):
    folder, expected, _ = served
    options = []
    if batching != "one by one":
        options = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
        options += ["--attn-implementation", batching.split()[1]]
    with server(folder, *options) as address:
        assert [complete(address, folder, prompt) for prompt in PROMPTS] == expected


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="make test-serve")
def test_many_requests_at_once(served):
    folder, _, expected = served
    # transformers refuses neither of the other two.
    bad = [(load.ELSEWHERE, 400), (load.NEGATIVE, None), (load.LONG, None)]
    options = ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    with server(folder, *options) as address:
        load.load(address, folder, expected, bad)
