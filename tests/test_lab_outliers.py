"""Statistics of activations, against the same computed from everything at once."""

import pytest
import torch
from helpers import cached, inputs_of_linears, random_ids, tiny
from zoo import FAMILIES, build

import fastrot
from fastrot.demo.outliers import with_outliers
from fastrot.lab.cache import WatchedCache
from fastrot.lab.outliers import SITES, Collector, Histogram, magnitudes, outliers

LINEARS = {
    "attention": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "mlp": "mlp.gate_proj",
    "down": "mlp.down_proj",
}


def vectors_of(model, ids):
    """Everything at once: vectors by site and layer, without the rooms under test."""
    inputs = inputs_of_linears(model, ids)
    layers = cached(model, [ids], WatchedCache(model))
    found = {}
    for number, layer in enumerate(layers):
        for site, name in LINEARS.items():
            found[site, number] = inputs[f"model.layers.{number}.{name}"]
        found["keys", number], found["values", number] = layer.keys, layer.values
    return found


@pytest.mark.parametrize("rotations", [(), ("R1", "R2", "R3", "R4")])
def test_streaming_is_the_same_as_all_at_once(rotations):
    model = with_outliers(tiny("llama"), scale=16)
    if rotations:
        fastrot.apply(model, rotations)
    ids = random_ids(model, 5, 24, seed=0)
    told = []
    got = outliers(model, ids, told.append)
    assert told == [24] * 5
    assert tuple(got) == SITES[:6]
    for (site, layer), x in vectors_of(model, ids).items():
        x = x.double().flatten(0, -2)
        power = x.square().mean(-1)
        peaks = x.abs().amax(-1) / power.sqrt()
        stats = got[site][layer]
        assert stats.vectors == len(x)
        assert stats.peak == pytest.approx(float(peaks.median()), rel=0.003)
        assert stats.worst == pytest.approx(float(peaks.max()), rel=1e-4)
        kurtosis = (x**4).mean(-1) / power**2
        assert stats.kurtosis == pytest.approx(float(kurtosis.mean()), rel=1e-4)
        assert stats.massive == 0


def test_rotations_spread_outliers():
    model = with_outliers(tiny("llama"), scale=64)
    ids = random_ids(model, 4, 24, seed=0)
    before = outliers(model, ids)
    fastrot.apply(model, ("R1", "R2", "R3", "R4"))
    after = outliers(model, ids)
    for site in before:
        for layer in range(2):
            assert after[site][layer].peak < 0.8 * before[site][layer].peak, site
            assert after[site][layer].kurtosis < before[site][layer].kurtosis, site


def test_massive_tokens_are_counted():
    collector = Collector()
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:3] *= 15
    x[3] *= 6
    x[4] = 0
    collector.add(x[:100])
    collector.add(x[100:].view(4, 25, 64))
    assert collector.result().massive == 3
    assert collector.result().vectors == 199


def test_normal_numbers_have_a_kurtosis_of_three():
    collector = Collector()
    collector.add(torch.randn(2000, 512, generator=torch.Generator().manual_seed(0)))
    assert collector.result().kurtosis == pytest.approx(3, abs=0.05)
    one = Collector()
    one.add(torch.eye(16))
    assert (one.result().kurtosis, one.result().worst) == (16, 4)


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_histograms_find_the_median(spread):
    values = (spread * torch.randn(1001, generator=torch.Generator().manual_seed(0))).exp()
    histogram = Histogram()
    for part in values.split(100):
        histogram.add(part)
    inside = values.clamp(2.0**-64, 2.0**64)
    assert histogram.median() == pytest.approx(float(inside.median()), rel=0.002)
    near = (values > 1.002).sum(), (values > 0.998).sum()
    assert near[0] <= histogram.above(1.0) <= near[1]
    assert histogram.counts.sum() == 1001


def test_the_surface_is_what_the_site_sees():
    model = tiny("llama")
    ids = random_ids(model, 1, 24, seed=0)
    everything = vectors_of(model, ids)
    for site, width in {"attention": 96, "down": 112, "keys": 32}.items():
        surface = magnitudes(model, ids[0], site, 1)
        assert surface.shape == (24, width)
        x = everything[site, 1][0]
        x = x.transpose(0, 1).flatten(1) if site == "keys" else x
        torch.testing.assert_close(surface, x.abs())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi3"])
def test_attention_is_seen_where_its_projections_are_one(name):
    model = build(FAMILIES[name], torch.float32)
    found = outliers(model, random_ids(model, 1, 8, seed=0))
    assert set(found["attention"]) == {*range(model.config.num_hidden_layers)}


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_latent_attention_caches_latents_and_positions(name):
    """Two massive channels of a latent, which R3 spreads; the key with the position stays."""
    model = build(FAMILIES[name])
    for key, parameter in model.named_parameters():
        if key.endswith("kv_a_proj_with_mqa.weight"):
            parameter.data[3:5] *= 50
    config = model.config
    ids = random_ids(model, 2, 12, seed=0)
    before = outliers(model, ids)
    assert tuple(before)[-2:] == ("latents", "positions")
    assert not {"keys", "values"}.intersection(before)
    widths = {"latents": config.kv_lora_rank, "positions": config.qk_rope_head_dim}
    for site, width in widths.items():
        assert magnitudes(model, ids[0], site, 0).shape == (12, width)
    fastrot.apply(model, "R3", transform_type="random-hadamard")
    after = outliers(model, ids)
    for layer, found in before["latents"].items():
        assert after["latents"][layer].peak < 0.75 * found.peak
        same = after["positions"][layer].peak
        assert same == pytest.approx(before["positions"][layer].peak, rel=0.01)
