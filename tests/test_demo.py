"""Simulated quantization, outlier channels, and the demo's measurements."""

import json
import math
from itertools import pairwise

import pytest
import torch
from helpers import cached, inputs_of_linears, logits, random_ids, tiny

from fastrot.demo.evaluate import (
    CASES,
    CONTEXT,
    heldout_windows,
    logit_errors,
    run,
    table,
)
from fastrot.demo.outliers import with_outliers
from fastrot.lab.cache import WatchedCache

EACH = len(CASES) + 1


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 6}, {"heads": 4, "kv_heads": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_change_no_bit_of_the_logits(dtype, shape):
    model = tiny("llama", dtype=dtype, **shape)
    untouched = {name: p.clone() for name, p in model.named_parameters()}
    ids = random_ids(model, 2, 24, seed=0)
    result = with_outliers(model, scale=64, seed=1)
    assert torch.equal(logits(result, ids), logits(model, ids))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[name])


def test_outliers_are_where_they_should_be():
    model = tiny("llama")
    scale, channels = 32, 3
    result = with_outliers(model, channels=channels, scale=scale)
    ids = random_ids(model, 2, 24, seed=0)
    before, after = (inputs_of_linears(m, ids) for m in (model, result))
    expected = {"q_proj": channels, "up_proj": channels, "down_proj": channels, "o_proj": 6}
    for name, x in before.items():
        ratio = (after[name] / x).flatten(0, 1)
        count = expected.get(name.rpartition(".")[2])
        if count is not None:
            # One value channel of a key-value head reaches all its query heads.
            assert (ratio.mean(0) > scale / 2).sum() == count, name
    layers = [cached(m, [ids], WatchedCache(m)) for m in (model, result)]
    for a, b in zip(*layers, strict=True):
        ratio = (b.keys / a.keys).median(2).values.round().long()
        assert ((ratio == scale).sum(-1) == 2).all()
        first, second = (ratio == scale).nonzero()[:, -1].view(-1, 2).T
        assert ((second - first) == 8).all()


def test_the_seed_chooses_the_channels():
    model = tiny("llama")
    a, b, c = (with_outliers(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.model.layers[0].mlp.up_proj.weight, b.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(
        a.model.layers[0].mlp.up_proj.weight, c.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("scale", [0, 3, 48, -2])
def test_scales_that_would_round_are_refused(scale):
    with pytest.raises(ValueError, match="is not a power of two"):
        with_outliers(tiny("llama"), scale=scale)


def test_windows_are_spread_over_the_text():
    windows, everything = heldout_windows(8 * CONTEXT), heldout_windows(1 << 30)
    assert windows.shape == (8, CONTEXT + 1)
    assert len(everything) * CONTEXT > 200_000
    assert torch.equal(everything[1:, 0], everything[:-1, -1])
    places = [next(i for i, e in enumerate(everything) if torch.equal(e, w)) for w in windows]
    gaps = {b - a for a, b in pairwise(places)}
    assert places[0] == 0
    assert max(gaps) - min(gaps) <= 1
    assert places[-1] + max(gaps) >= len(everything)
    assert len(heldout_windows(1)) == 1


def test_logit_errors():
    expected = torch.tensor([[3.0, 4.0]])
    assert logit_errors(expected, expected) == (0.0, 0.0)
    assert logit_errors(expected + torch.tensor([0.0, -0.5]), expected) == (0.5, 0.1)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", vocab=256).save_pretrained(folder)
    return run(folder, nbytes=2 * CONTEXT, transform_type="random-hadamard", steps=5)


def test_the_report_holds_every_case(report):
    assert [(row.model, row.rotations, row.bits, row.learned) for row in report.rows] == [
        (name, *case)
        for name in ("as trained", "with outliers")
        for case in (*((*case, False) for case in CASES), (*CASES[-1], True))
    ]
    assert set(report.recommended) == {"as trained", "with outliers"}
    assert report.evaluated_bytes == 2 * CONTEXT
    assert json.loads(json.dumps(report.to_dict()))["transform_type"] == "random-hadamard"
    for row in report.rows:
        assert math.log2(row.perplexity) == pytest.approx(row.bits_per_byte)
        assert (row.seconds is not None) == bool(row.rotations)
        assert row.relative_error < 1e-5
        assert (row.max_error > 0) == bool(row.rotations)


def test_the_copy_with_outliers_is_the_same_model_until_it_is_quantized(report):
    plain, copied = report.rows[:EACH], report.rows[EACH:]
    assert plain[0].perplexity == copied[0].perplexity
    assert plain[1].perplexity != copied[1].perplexity


def test_the_table_shows_every_measurement(report):
    text = table(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for row in report.rows:
        name = "R1-R4 learned" if row.learned else " ".join(row.rotations) or "none"
        assert any(
            line.startswith(row.model) and f" {name} " in line and f"{row.perplexity:.3f}" in line
            for line in lines
        )
    for word in (
        "recommended for W4A4KV4, as trained: ",
        "1,024 bytes",
        report.python,
        report.torch,
        "random-hadamard",
        "changes no bit",
    ):
        assert word in text


def test_rotations_help_the_embedded_model():
    """The least that the demo claims: with outliers, quantized, rotated is better than not."""
    rows = run(nbytes=4 * CONTEXT, steps=60).rows
    exact, none, fused, online, learned = (row.perplexity for row in rows[EACH:])
    assert exact < learned < online < fused < none
