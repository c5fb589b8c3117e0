"""Greedy decoding emits the same tokens, whatever holds the keys."""

import copy

import pytest
import torch
from helpers import random_ids, relative_error, tiny, word_tokenizer
from test_exact import MODEL_TYPES, ROTATIONS
from transformers import (
    AttentionInterface,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    pipeline,
)
from zoo import FAMILIES, build

import fastrot
from fastrot.integrations.transformers import cache_argument

KINDS_OF_CACHE = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "beams": {"num_beams": 3},
}


@pytest.fixture(scope="module", params=MODEL_TYPES)
def pair(request):
    model = tiny(request.param, dtype=torch.float32)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, ROTATIONS, transform_type="random-hadamard", randomize=True)
    return model, rotated


def padded_batch(model):
    ids = random_ids(model, 3, 12, seed=3)
    mask = torch.ones_like(ids)
    for row, length in enumerate((5, 0, 9)):
        ids[row, :length] = 0
        mask[row, :length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **kwargs):
    return model.generate(
        **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", KINDS_OF_CACHE)
def test_same_64_tokens(pair, cache, attention):
    model, rotated = (copy.deepcopy(m) for m in pair)
    model.set_attn_implementation(attention)
    rotated.set_attn_implementation(attention)
    inputs = padded_batch(model)
    expected = generate(model, inputs, **KINDS_OF_CACHE[cache])
    assert torch.equal(generate(rotated, inputs, **KINDS_OF_CACHE[cache]), expected)


def batched(model, prompts):
    """Tokens of continuous batching: prompts share batches of 16, and are cut where one is full."""
    answers = model.generate_batch(
        prompts,
        GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=16),
        progress_bar=False,
    )
    assert [answer.error for answer in answers.values()] == [None] * len(prompts)
    return [answer.generated_tokens for answer in answers.values()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching(pair, attention):
    model, rotated = (copy.deepcopy(m) for m in pair)
    prompts = [random_ids(model, 1, length, seed=length)[0].tolist() for length in (3, 23, 9)]
    for m in (model, rotated):
        m.set_attn_implementation(attention)
    expected = batched(model, prompts)
    assert batched(rotated, prompts) == expected
    assert rotated.config._attn_implementation == attention
    for layer in rotated.model.layers:
        layer.self_attn.fastrot_q_attn = torch.nn.Identity()
    assert batched(rotated, prompts) != expected


def test_continuous_batching_stays_with_an_attention_that_r3_knows(pair, monkeypatch):
    """It changes to flash attention where that is installed and the model says it can."""
    home = "transformers.generation.continuous_batching.continuous_api."
    for version in (2, 3):
        monkeypatch.setattr(f"{home}is_flash_attn_{version}_available", lambda **kwargs: True)
    asked = []
    model, rotated = (copy.deepcopy(m) for m in pair)
    monkeypatch.setattr(
        type(model), "set_attn_implementation", lambda self, name: asked.append(name)
    )
    limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=16)
    rotated.init_continuous_batching(model.generation_config, limits)
    assert asked in ([], ["paged|sdpa"])
    for m in (model, fastrot.remove(rotated) or rotated):
        asked.clear()
        m.init_continuous_batching(model.generation_config, limits)
        assert "flash" in asked[0]


def cached_keys(model, ids, cache):
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            model(token, **cache_argument(model, cache), use_cache=True)
    return [layer.keys[:, :, : ids.shape[1]].clone() for layer in cache.layers]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_keys_are_cached_rotated_exactly_once(pair, kind):
    """The cache holds k R: every key is rotated when it comes, and never again."""
    model, rotated = pair
    ids = random_ids(model, 2, 6, seed=4)

    def cache(m):
        if kind == "dynamic":
            return DynamicCache(config=m.config)
        return StaticCache(config=m.config, max_cache_len=8)

    plain = cached_keys(model, ids, cache(model))
    keys = cached_keys(rotated, ids, cache(rotated))
    for layer, before, after in zip(rotated.model.layers, plain, keys, strict=True):
        rotation = layer.self_attn.fastrot_k_cache.rotation
        torch.testing.assert_close(after, rotation.apply(before), rtol=0, atol=2e-5)
        assert (after - before).abs().max() > 1e-2


@pytest.mark.slow
def test_compiled_in_one_graph(pair):
    model, rotated = pair
    inputs = padded_batch(model)
    compiled = torch.compile(copy.deepcopy(rotated), fullgraph=True)
    with torch.no_grad():
        expected = rotated(**inputs).logits
        got = compiled(**inputs).logits
        cache = StaticCache(config=rotated.config, max_cache_len=16)
        static = compiled(**inputs, **cache_argument(rotated, cache), use_cache=True).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(static, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_a_static_cache_with_the_decoder_compiled(pair):
    """As generate does by itself where there is a GPU."""
    model, rotated = pair
    inputs = padded_batch(model)
    compiled = CompileConfig(fullgraph=True)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(generate(rotated, inputs, **static), generate(model, inputs))
    assert rotated._compiled_call is not None


def test_pipeline(pair, tmp_path):
    texts = []
    for name, model in zip(("plain", "rotated"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
        # Given, as the one that is found for a folder depends on the type of its model.
        answer = pipeline(
            "text-generation", str(tmp_path / name), tokenizer=word_tokenizer(), device="cpu"
        )
        asked = ["w7 w9 w31", "w60 w12 w5 w5 w8"]
        texts.append(answer(asked, batch_size=2, max_new_tokens=32, do_sample=False))
    assert texts[0] == texts[1]
    assert len(texts[0][1][0]["generated_text"]) > 32


def test_another_attention_implementation_is_refused_at_run_time(pair, monkeypatch):
    rotated = copy.deepcopy(pair[1])
    monkeypatch.setitem(AttentionInterface._global_mapping, "another", print)
    rotated.set_attn_implementation("another")
    with pytest.raises(RuntimeError, match=r"'another'; .*set_attn_implementation\('sdpa'\)"):
        rotated(random_ids(rotated, 1, 5, seed=0))


def test_two_models_are_strangers(pair):
    """The rotated model in the same process leaves its original alone."""
    model, rotated = pair
    inputs = padded_batch(model)
    before = model(**inputs).logits
    rotated(**inputs)
    assert torch.equal(model(**inputs).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not any("fastrot" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", fastrot.Recipe("R3")),
        ("llama", fastrot.Recipe("R1", keep_head=True)),
        ("gemma2", fastrot.Recipe("R1")),
    ],
    ids=["R3", "keep_head", "norms behind"],
)
@torch.no_grad()
def test_what_was_compiled_for_the_unrotated_model_is_not_taken(family, recipe):
    """torch.compile does not ask whether a module has hooks."""
    model = build(FAMILIES[family], torch.float32)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, recipe)
    ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))

    def steps(model, run):
        cache = StaticCache(config=model.config, max_cache_len=16)
        given = {**cache_argument(model, cache), "use_cache": True}
        return torch.cat([run(token, **given).logits for token in ids.split(1, dim=1)], 1)

    expected = steps(model, model)
    torch._dynamo.reset()
    for case in (model, rotated):
        found = steps(case, torch.compile(case, backend="eager", dynamic=False))
        assert relative_error(found, expected) < 1e-5


def test_a_quantized_cache_holds_rotated_keys():
    """Two channels of the keys are massive: rotated, 4 bits lose a fraction of what they lost."""
    pytest.importorskip("optimum.quanto")
    model = tiny("llama", head_dim=64, heads=4, kv_heads=2, hidden=128)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[[3, 70]] *= 30
            layer.self_attn.q_proj.weight[[3, 67, 134, 198]] /= 30
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, ("R2", "R3", "R4"), transform_type="random-hadamard")
    ids = random_ids(model, 2, 24, seed=0)

    def answer(model, cache):
        with torch.no_grad():
            tokens = ids.split(1, dim=1)
            return torch.cat(
                [model(t, **cache_argument(model, cache), use_cache=True).logits for t in tokens], 1
            ).double()

    exact = answer(model, DynamicCache())
    assert (answer(rotated, DynamicCache()) - exact).norm() < 1e-5 * exact.norm()
    plain, turned = (
        float((answer(m, quantized_cache(m)) - exact).norm() / exact.norm())
        for m in (model, rotated)
    )
    assert 1e-3 < turned < 0.7 * plain


def quantized_cache(model):
    """In 4 bits. Two tokens stay as they are; groups of 32 numbers share a scale."""
    return QuantizedCache(
        "quanto", model.config, 4, axis_key=0, axis_value=0, q_group_size=32, residual_length=2
    )
