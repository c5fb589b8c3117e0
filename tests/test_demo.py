"""Simulated quantization, outlier channels, and the demo's measurements."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from helpers import levels, logits, random_ids, relative_error, tiny
from torch import nn

import fastrot
from fastrot.demo.evaluate import (
    BATCH,
    CASES,
    CONTEXT,
    heldout_loss,
    heldout_windows,
    logit_errors,
    run,
    table,
)
from fastrot.demo.outliers import with_outliers
from fastrot.demo.quantize import quantize, rounding_cache
from fastrot.integrations.transformers import cache_argument
from fastrot.lab.quantizers import round_asymmetric, round_symmetric

ROTATIONS = ("R1", "R2", "R3", "R4")


def inputs_of_linears(model, ids):
    """What the linears really multiply with: seen after all other hooks."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0].clone()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("rotations", [(), ROTATIONS])
def test_what_is_quantized_and_what_is_not(rotations):
    model = tiny("llama")
    if rotations:
        fastrot.apply(model, rotations)
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize(model)
    decoder = {
        f"{name}.weight"
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear)
    }
    assert len(decoder) == 7 * len(model.model.layers)
    for name, parameter in model.named_parameters():
        if name in decoder:
            assert torch.equal(parameter, round_symmetric(before[name], 4))
            assert levels(parameter) <= 15 < levels(before[name])
        else:
            assert torch.equal(parameter, before[name])
    for name, x in inputs_of_linears(model, random_ids(model, 2, 12, seed=0)).items():
        assert (levels(x) <= 15) == (name != "lm_head"), name


def test_r4_comes_before_the_rounding():
    model = tiny("llama")
    fastrot.apply(model, "R4")
    quantized = copy.deepcopy(model)
    quantize(quantized)
    ids = random_ids(model, 2, 12, seed=0)
    for index in range(2):
        x = inputs_of_linears(quantized, ids)[f"model.layers.{index}.mlp.down_proj"]
        rotation = quantized.model.layers[index].mlp.fastrot_down_proj_input.rotation
        assert levels(x) <= 15
        assert levels(rotation.apply(x, inverse=True)) > 50


def cached(model, ids, cache):
    with torch.no_grad():
        for part in ids:
            model(part, **cache_argument(model, cache), use_cache=True)
    return cache.layers


def test_r3_comes_before_the_rounding():
    model = tiny("llama")
    fastrot.apply(model, ("R3",))
    ids = random_ids(model, 2, 12, seed=0)
    exact = cached(model, [ids], rounding_cache(model, bits=24))[0]
    layers = cached(model, [ids], rounding_cache(model))
    # The first layer sees the same input in both.
    torch.testing.assert_close(layers[0].keys, round_asymmetric(exact.keys, 4))
    torch.testing.assert_close(layers[0].values, round_asymmetric(exact.values, 4))
    rotation = model.model.layers[0].self_attn.fastrot_k_cache.rotation
    for layer in layers:
        assert layer.keys.shape == (2, 2, 12, 16)
        assert levels(layer.keys) <= 16
        assert levels(layer.values) <= 16
    assert not torch.allclose(layers[0].keys, rotation.apply(layers[0].keys, inverse=True))


def test_keys_are_rounded_once_when_they_come():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    once = cached(model, [ids], rounding_cache(model))
    steps = cached(model, ids.split(1, dim=1), rounding_cache(model))
    torch.testing.assert_close(once[0].keys, steps[0].keys)
    torch.testing.assert_close(once[0].values, steps[0].values)


@pytest.mark.parametrize("rotations", [(), ("R1", "R2"), ROTATIONS])
def test_more_bits_come_closer_to_the_model(rotations):
    model = tiny("llama")
    ids = random_ids(model, 4, 24, seed=0)
    expected = logits(model, ids)
    if rotations:
        fastrot.apply(model, rotations)
    errors = []
    for bits in (2, 4, 8, 16):
        case = copy.deepcopy(model)
        quantize(case, bits)
        with torch.no_grad():
            got = case(ids, **cache_argument(case, rounding_cache(case, bits))).logits
        errors.append(relative_error(got, expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < 0.05 < errors[0]


def test_every_rotation_changes_what_is_rounded():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    results = []
    for rotations in ((), ("R1", "R2", "R3"), ("R1", "R2", "R4"), ROTATIONS):
        case = copy.deepcopy(model)
        if rotations:
            fastrot.apply(case, rotations)
        quantize(case)
        with torch.no_grad():
            results.append(case(ids, **cache_argument(case, rounding_cache(case))).logits)
    for i, a in enumerate(results):
        for b in results[:i]:
            assert relative_error(a, b) > 1e-3


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
    layers = [cached(m, [ids], rounding_cache(m, 24)) for m in (model, result)]
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


def test_loss_is_the_mean_over_all_bytes():
    model = tiny("llama", vocab=256)
    windows = torch.randint(256, (BATCH + 3, 33), generator=torch.Generator().manual_seed(0))
    log_probabilities = logits(model, windows[:, :-1]).log_softmax(-1)
    expected = -log_probabilities.gather(-1, windows[:, 1:, None]).mean()
    assert heldout_loss(model, windows) == pytest.approx(float(expected), rel=1e-5)


def test_logit_errors():
    expected = torch.tensor([[3.0, 4.0]])
    assert logit_errors(expected, expected) == (0.0, 0.0)
    assert logit_errors(expected + torch.tensor([0.0, -0.5]), expected) == (0.5, 0.1)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", vocab=256).save_pretrained(folder)
    return run(folder, nbytes=2 * CONTEXT, transform_type="random-hadamard")


def test_the_report_holds_every_case(report):
    assert [(row.model, row.rotations, row.bits) for row in report.rows] == [
        (name, *case) for name in ("as trained", "with outliers") for case in CASES
    ]
    assert report.evaluated_bytes == 2 * CONTEXT
    assert json.loads(json.dumps(report.to_dict()))["transform_type"] == "random-hadamard"
    for row in report.rows:
        assert math.log2(row.perplexity) == pytest.approx(row.bits_per_byte)
        assert (row.seconds is not None) == bool(row.rotations)
        assert row.relative_error < 1e-5
        assert (row.max_error > 0) == bool(row.rotations)


def test_the_copy_with_outliers_is_the_same_model_until_it_is_quantized(report):
    plain, copied = report.rows[: len(CASES)], report.rows[len(CASES) :]
    assert plain[0].perplexity == copied[0].perplexity
    assert plain[1].perplexity != copied[1].perplexity


def test_the_table_shows_every_measurement(report):
    text = table(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for row in report.rows:
        name = " ".join(row.rotations) or "none"
        assert any(
            line.startswith(row.model) and f" {name} " in line and f"{row.perplexity:.3f}" in line
            for line in lines
        )
    for word in ("1,024 bytes", report.python, report.torch, "random-hadamard", "changes no bit"):
        assert word in text


def test_rotations_help_the_embedded_model():
    """The least that the demo claims: with outliers, quantized, rotated is better than not."""
    rows = run(nbytes=4 * CONTEXT).rows
    exact, none, fused, online = (row.perplexity for row in rows[len(CASES) :])
    assert exact < online < fused < none
