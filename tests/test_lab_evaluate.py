"""Losses, paired differences, and the text they are measured on."""

import math

import pytest
import torch
import transformers
from helpers import logits, tiny, word_tokenizer
from zoo import FAMILIES, build

from fastrot import RotationError
from fastrot.lab import evaluate as room
from fastrot.lab.corpus import cut, found_text, read_texts, tokenize
from fastrot.lab.evaluate import Losses, check_causal, compare, evaluate


def random_windows(count, length=33, vocab=64):
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("most", [1, 2**26])
def test_losses_are_the_means_of_windows(most, monkeypatch):
    monkeypatch.setattr(room, "LOGITS", most)
    model, told = tiny("llama"), []
    windows = random_windows(11)
    log_probabilities = logits(model, windows[:, :-1]).log_softmax(-1)
    expected = -log_probabilities.gather(-1, windows[:, 1:, None]).mean((1, 2))
    losses = evaluate(model, windows, told.append)
    torch.testing.assert_close(losses.windows, expected, rtol=1e-5, atol=0)
    assert losses.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)
    assert told == [32] * 11 if most == 1 else [256, 96]


def test_pairs_leave_out_what_windows_have_in_common():
    generator = torch.Generator().manual_seed(0)
    hard = 5 * torch.randn(400, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    base, other = Losses(hard), Losses(hard + 0.02 + noise)
    got = compare(other, base)
    assert got.mean == pytest.approx(float((0.02 + noise).mean()))
    assert got.error == pytest.approx(0.1 / 20, rel=0.1)
    assert got.is_clear
    back = compare(base, other)
    assert (back.mean, back.error) == (-got.mean, pytest.approx(got.error))
    assert not compare(Losses(hard + noise - noise.mean()), base).is_clear


def test_the_standard_error_covers_the_truth():
    """Of many experiments about one in twenty lies beyond two standard errors."""
    draws = torch.randn(2000, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clear = sum(compare(Losses(d), Losses(torch.zeros_like(d))).is_clear for d in draws)
    assert 0.035 < clear / 2000 < 0.08


def test_comparisons_that_mean_nothing_are_refused():
    with pytest.raises(RotationError, match="2 and 3 windows"):
        compare(Losses(torch.zeros(2)), Losses(torch.zeros(3)))
    with pytest.raises(RotationError, match="two windows or more"):
        compare(Losses(torch.zeros(1)), Losses(torch.zeros(1)))


def test_windows_overlap_in_one_token_and_spread():
    stream = torch.arange(1000)
    windows = cut(stream, 10, 10**6)
    assert windows.shape == (99, 11)
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    some = cut(stream, 10, 50)
    assert len(some) == 5
    assert some[0, 0] == 0
    assert (some[1:, 0] - some[:-1, 0]).tolist() == pytest.approx([198] * 4, abs=10)
    assert len(cut(stream, 10, 1)) == 1
    assert len(cut(stream, 10, 1, least=2)) == 2


def test_too_little_text_is_refused():
    with pytest.raises(RotationError, match="has 20 tokens, and 2 windows of 10 need 21"):
        cut(torch.arange(20), 10, 100, least=2)
    assert len(cut(torch.arange(21), 10, 100, least=2)) == 2


def test_texts_of_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"w{ord(name)} w5", encoding="utf-8")
    assert read_texts([tmp_path / "a", tmp_path / "b"]) == "w97 w5\n\nw98 w5"
    (tmp_path / "c").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RotationError, match="c is no text in UTF-8"):
        read_texts([tmp_path / "c"])
    assert tokenize("w5 w7\n\nw9", word_tokenizer()).tolist() == [5, 7, 9]


def test_text_is_found_on_this_machine():
    text = found_text()
    assert len(text) > 300_000
    assert " the " in text


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_what_predicts_no_tokens_is_refused(kind):
    config = tiny("llama").config
    config.num_labels = 12
    model = getattr(transformers, f"Llama{kind}")(config).eval()
    with pytest.raises(RotationError, match=f"Llama{kind} has no language-model head; pass"):
        check_causal(model)


@pytest.mark.parametrize("name", ["nemotron_h_omni", "apertus1p5", "gpt2"])
def test_heads_without_a_name_or_with_other_rows_are_taken(name):
    if name not in FAMILIES:
        pytest.skip(f"{name} is newer than this transformers")
    model = build(FAMILIES[name], torch.float32)
    check_causal(model)
    assert evaluate(model, random_windows(1, 9)).windows.isfinite().all()
