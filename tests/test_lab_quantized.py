"""Models that run as if they were quantized: what is rounded, where, and that it comes off."""

import copy

import pytest
import torch
from helpers import (
    cached,
    difference,
    fingerprint,
    inputs_of_linears,
    levels,
    logits,
    random_ids,
    relative_error,
    tiny,
)
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from zoo import FAMILIES, build

import fastrot
from fastrot import RotationError
from fastrot.demo.outliers import with_outliers
from fastrot.integrations.transformers import cache_argument
from fastrot.lab.cache import WatchedCache, watched
from fastrot.lab.evaluate import evaluate
from fastrot.lab.quantized import decoder_layers, kv_rounding, linears_of, quantized
from fastrot.lab.quantizers import asymmetric_grid, fake_quantize, symmetric_grid
from fastrot.lab.schemes import Numbers, Scheme


def round_symmetric(x, bits, clip=1.0):
    return symmetric_grid(x, bits, clip).nearest(x)


def round_asymmetric(x, bits, clip=1.0):
    return asymmetric_grid(x, bits, clip).nearest(x)


ROTATIONS = ("R1", "R2", "R3", "R4")
KV4 = kv_rounding(Numbers(symmetric=False))


@pytest.mark.parametrize("rotations", [(), ROTATIONS])
def test_what_is_quantized_and_what_is_not(rotations):
    model = tiny("llama")
    if rotations:
        fastrot.apply(model, rotations)
    before = {name: p.clone() for name, p in model.named_parameters()}
    decoder = {
        f"{name}.weight"
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear)
    }
    assert len(decoder) == 7 * len(model.model.layers)
    ids = random_ids(model, 2, 12, seed=0)
    with quantized(model, "w4a4"):
        for name, parameter in model.named_parameters():
            if name in decoder:
                assert torch.equal(parameter, round_symmetric(before[name], 4))
                assert levels(parameter) <= 15 < levels(before[name])
            else:
                assert torch.equal(parameter, before[name])
        for name, x in inputs_of_linears(model, ids).items():
            assert (levels(x) <= 15) == (name != "lm_head"), name


@pytest.mark.parametrize("scheme", ["w4a4kv4", "a8", "w4g16mse", "kv4"])
def test_everything_comes_back(scheme):
    model = tiny("llama")
    fastrot.apply(model, ROTATIONS)
    ids = random_ids(model, 2, 12, seed=0)
    before, expected = fingerprint(model), logits(model, ids)
    with quantized(model, scheme):
        assert relative_error(logits(model, ids), expected) > 1e-3
        assert difference(before, fingerprint(model))
    assert difference(before, fingerprint(model)) == []
    with pytest.raises(ZeroDivisionError), quantized(model, scheme):
        raise ZeroDivisionError
    # 48 does not divide the 112 inputs of the last linear of a layer; others were rounded before.
    message = r"down_proj\.weight: 112 elements do not divide"
    with pytest.raises(RotationError, match=message), quantized(model, "w4g48a4"):
        pass
    assert difference(before, fingerprint(model)) == []
    assert torch.equal(logits(model, ids), expected)


def test_no_scheme_changes_nothing():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    expected = logits(model, ids)
    with quantized(model, Scheme()):
        assert torch.equal(logits(model, ids), expected)


def test_parts_of_a_scheme_touch_their_part_only():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    results = []
    for scheme in ("w4", "a4", "kv4", "w4a4kv4"):
        with quantized(model, scheme):
            changed = any(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
            assert changed == ("w4" in scheme)
            few = [levels(x) <= 15 for n, x in inputs_of_linears(model, ids).items() if "_" in n]
            assert few.count(True) == (14 if "a4" in scheme else 0)
            results.append(logits(model, ids))
    for i, a in enumerate(results):
        assert all(relative_error(a, b) > 1e-3 for b in results[:i])


def test_r4_comes_before_the_rounding():
    model = tiny("llama")
    fastrot.apply(model, "R4")
    ids = random_ids(model, 2, 12, seed=0)
    with quantized(model, "w4a4"):
        inputs = inputs_of_linears(model, ids)
    for index in range(2):
        x = inputs[f"model.layers.{index}.mlp.down_proj"]
        rotation = model.model.layers[index].mlp.fastrot_down_proj_input.rotation
        assert levels(x) <= 15
        assert levels(rotation.apply(x, inverse=True)) > 50


def test_r3_comes_before_the_rounding():
    model = tiny("llama")
    fastrot.apply(model, ("R3",))
    ids = random_ids(model, 2, 12, seed=0)
    exact = cached(model, [ids], WatchedCache(model))[0]
    layers = cached(model, [ids], WatchedCache(model, KV4))
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
    once = cached(model, [ids], WatchedCache(model, KV4))
    steps = cached(model, ids.split(1, dim=1), WatchedCache(model, KV4))
    torch.testing.assert_close(once[0].keys, steps[0].keys)
    torch.testing.assert_close(once[0].values, steps[0].values)


def test_the_context_gives_a_cache_that_rounds():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    cache = WatchedCache(model, KV4)
    with torch.no_grad():
        expected = model(ids, **cache_argument(model, cache), use_cache=True).logits.double()
    with quantized(model, "kv4"):
        assert torch.equal(logits(model, ids), expected)
        # The same in two steps: the prefix comes out of the cache.
        given = cache_argument(model, WatchedCache(model))
        with torch.no_grad():
            parts = [model(part, **given, use_cache=True).logits for part in ids.split(6, dim=1)]
        assert relative_error(torch.cat(parts, 1), expected) < 1e-5


def test_a_cache_that_would_not_be_rounded_is_refused():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    given = cache_argument(model, DynamicCache(config=model.config))
    with quantized(model, "kv4"), pytest.raises(RotationError, match="is a DynamicCache, whose"):
        model(ids, **given)
    model(ids, **given)


def test_a_model_that_asks_no_cache_is_refused():
    model = tiny("llama")
    model.forward = lambda ids, **kwargs: ids
    with quantized(model, "kv4"), pytest.raises(RotationError, match="put no keys and values"):
        model(random_ids(model, 2, 12, seed=0))


def test_watching_sees_what_is_not_rounded():
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    seen = {}

    def see(layer, keys, values):
        seen[layer] = (keys, values)
        return keys, values

    expected = logits(model, ids)
    with watched(model, see):
        assert torch.equal(logits(model, ids), expected)
    layers = cached(model, [ids], DynamicCache(config=model.config))
    assert sorted(seen) == [0, 1]
    for layer, (keys, values) in seen.items():
        assert torch.equal(keys, layers[layer].keys)
        assert torch.equal(values, layers[layer].values)


@pytest.mark.parametrize("rotations", [(), ("R1", "R2"), ROTATIONS])
def test_more_bits_come_closer_to_the_model(rotations):
    model = tiny("llama")
    ids = random_ids(model, 4, 24, seed=0)
    expected = logits(model, ids)
    if rotations:
        fastrot.apply(model, rotations)
    errors = []
    for bits in (2, 4, 8, 16):
        with quantized(model, f"w{bits}a{bits}kv{bits}"):
            errors.append(relative_error(logits(model, ids), expected))
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
        with quantized(case, "w4a4kv4"):
            results.append(logits(case, ids))
    for i, a in enumerate(results):
        for b in results[:i]:
            assert relative_error(a, b) > 1e-3


def test_conv1d_is_rounded_along_its_inputs():
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=64)).eval()
    weight = model.transformer.h[0].attn.c_attn.weight
    expected = fake_quantize(weight.detach().T, Numbers()).T
    assert len(linears_of(model)) == 8
    with quantized(model, "w4"):
        assert torch.equal(weight, expected)
    assert not torch.equal(weight, expected)


@pytest.mark.parametrize("scheme", ["nvfp4", "a4t", "kv4t", "w4a4kv4"])
def test_windows_of_a_batch_do_not_mind_one_another(scheme):
    model = with_outliers(tiny("llama"), scale=64)
    windows = random_ids(model, 4, 17, seed=0)
    windows[1] = 5  # of one word, so that its scales are others
    with quantized(model, scheme):
        together = evaluate(model, windows).windows
        alone = torch.cat([evaluate(model, each).windows for each in windows.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds", None])
def test_windows_that_a_model_lays_flat_do_not_mind_one_another(given):
    """OPT's MLP sees the tokens of all windows in one row."""
    model = build(FAMILIES["opt"], torch.float32)
    ids = random_ids(model, 4, 17, seed=0)
    ids[1] = 5

    def run(ids):
        x = model.get_input_embeddings()(ids) if given == "inputs_embeds" else ids
        return model(**{given: x}).logits if given else model(x).logits

    with torch.no_grad(), quantized(model, "a4t"):
        together = run(ids)
        alone = torch.cat([run(each) for each in ids.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_what_is_not_rounded_may_be_of_any_kind():
    experts = build(FAMILIES["mixtral"], torch.float32)
    ids = random_ids(experts, 2, 9, seed=0)
    plain = evaluate(experts, ids)
    with quantized(experts, "kv4"):
        assert not torch.equal(evaluate(experts, ids).windows, plain.windows)
    norms = build(FAMILIES["cohere"], torch.float32)
    for layer in norms.model.layers:
        layer.self_attn.q_norm = CohereLayerNorm((3, 32))
    assert len(linears_of(norms)) == 7 * len(norms.model.layers)


def test_slices_of_weights_are_refused():
    with pytest.raises(RotationError, match="pretraining_tp=2 multiplies slices of weights past"):
        linears_of(build(FAMILIES["bloom_sliced"], torch.float32))


def test_the_layers_are_the_decoder_s_own():
    """A tower of as many blocks may stand before them."""
    model = tiny("llama")
    layers = model.model.layers
    del model.model.layers
    model.model.tower = nn.Module()
    model.model.tower.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in layers)
    model.model.layers = layers
    assert [*decoder_layers(model)] == [f"model.layers.{i}" for i in range(len(layers))]


def test_stacked_experts_are_refused_and_not_left_out():
    config = MixtralConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_local_experts=4,
        num_attention_heads=3, num_key_value_heads=3, vocab_size=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = MixtralForCausalLM(config)
    with pytest.raises(RotationError, match="is the weight of no linear module"):
        linears_of(model)
