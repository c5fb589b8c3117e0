"""R3 finds its way by types, whatever a release of transformers or a user calls things."""

import copy

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from transformers import DynamicCache, EncoderDecoderCache, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaAttention

import fastrot
from fastrot.integrations.transformers import cache_argument

WIDTH = 64


def everywhere(pattern):
    """R3 on all modules of a name, cross attention too."""
    places = [
        {"targets": [pattern], "location": location, "inverse": False}
        for location in ("q_attn", "k_cache")
    ]
    scheme = {"type": "random-hadamard", "head_dim": 16, "precision": "float64", "apply": places}
    return {"config_groups": {"R3": scheme}}


@pytest.fixture(scope="module")
def with_cross_attention():
    config = GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=64, n_positions=64, add_cross_attention=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, transform_config=everywhere(r"re:.*\.(attn|crossattention)$"))
    return model, rotated


@torch.no_grad()
def decode(model, cache):
    """Logits token by token, beside five states of an encoder."""
    ids = random_ids(model, 2, 6, seed=0)
    states = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    steps = [
        model(token, encoder_hidden_states=states, **cache_argument(model, cache)).logits
        for token in ids.split(1, 1)
    ]
    return torch.cat(steps, 1)


def test_keys_of_cross_attention_are_cached_rotated_once(with_cross_attention):
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    plain, rotated = map(decode, with_cross_attention, caches)
    assert relative_error(rotated, plain) < 1e-12
    for block, *layers in zip(
        with_cross_attention[1].transformer.h,
        *(cache.self_attention_cache.layers for cache in caches),
        *(cache.cross_attention_cache.layers for cache in caches),
        strict=True,
    ):
        for module, before, after in zip(
            (block.attn, block.crossattention), layers[::2], layers[1::2], strict=True
        ):
            rotation = module.fastrot_k_cache
            torch.testing.assert_close(after.keys, rotation(before.keys), rtol=0, atol=1e-12)


def test_cross_attention_without_a_cache(with_cross_attention):
    plain, rotated = (decode(model, None) for model in with_cross_attention)
    assert relative_error(rotated, plain) < 1e-12


class Borrowed:
    """A cache of no type that transformers knows."""

    def __init__(self):
        self.cache = DynamicCache()

    def __getattr__(self, name):
        return getattr(self.cache, name)


@pytest.mark.parametrize("kind", [DynamicCache, Borrowed])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_cache_has_no_name(kind, attention):
    """As the fourth argument, and even where it is not known for one, keys turn exactly once."""
    model = tiny("llama", dtype=torch.float64)
    model.set_attn_implementation(attention)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, "R3", randomize=True)
    x = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results, kept = [], []
    for m in (model, rotated):
        cache = kind()
        turns = m.model.rotary_emb(x, torch.arange(6)[None])
        results.append(
            torch.cat(
                [
                    m.model.layers[0].self_attn(x[:, i : i + 1], at, None, cache)[0]
                    for i in range(6)
                    for at in [tuple(turn[:, i : i + 1] for turn in turns)]
                ],
                1,
            )
        )
        kept.append(cache.layers[0].keys)
    assert relative_error(*results) < 1e-6
    rotation = rotated.model.layers[0].self_attn.fastrot_k_cache
    assert relative_error(kept[1], rotation(kept[0]) if kind is DynamicCache else kept[0]) < 1e-6


class Delegating(LlamaAttention):
    """A user's attention that ends in the inherited one."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Inheriting(LlamaAttention):
    """A user's attention that adds something else."""


class Own(LlamaAttention):
    """A user's attention that pays attention to nothing."""

    def forward(self, hidden_states, **kwargs):
        return self.o_proj(self.v_proj(hidden_states).repeat(1, 1, 3)), None


class Narrow(LlamaAttention):
    """A user's attention that keeps keyword arguments to itself."""

    def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask)


def with_attention(kind, attention):
    model = tiny("llama", dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [Delegating, Inheriting])
def test_a_subclass_of_the_users(kind, attention):
    model = with_attention(kind, attention)
    ids = random_ids(model, 2, 12, seed=0)
    before = logits(model, ids)
    # One that keeps the forward of transformers is known; others have to be vouched for.
    fastrot.apply(model, "R3", trust=True)
    assert relative_error(logits(model, ids), before) < 1e-6


def test_an_attention_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"layers.0.self_attn \(Own\) does not use"):
        fastrot.apply(with_attention(Own, "sdpa"), "R3")


def test_keys_that_would_stay_unrotated_are_noticed():
    model = with_attention(Narrow, "sdpa")
    fastrot.apply(model, "R3", trust=True)
    with pytest.raises(RuntimeError, match=r"R3: the forward of this Narrow .* leave R3 out"):
        model(random_ids(model, 2, 12, seed=0))
    model = tiny("llama")
    fastrot.apply(model, "R3")
    for layer in model.model.layers:
        layer.forward = layer.self_attn.forward
    with pytest.raises(RuntimeError, match="LlamaAttention was called directly"):
        model(random_ids(model, 2, 12, seed=0))
