"""Finite in, finite out, and no figure that rounds away: decided before the first write."""

import copy
import warnings

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from transformers import LlamaForCausalLM
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot.values import dynamic_range

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.post_attention_layernorm.weight"
EVERY = ("R1", "R2", "R3", "R4")


def refused(model, words, rotations=EVERY):
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError) as caught:
        fastrot.apply(model, rotations)
    assert all(word in str(caught.value) for word in words), caught.value
    assert difference(before, fingerprint(model)) == []


def with_value(name, value, dtype, place=(1, 2)):
    model = tiny("llama", dtype=dtype)
    parameter = model.get_parameter(name)
    parameter.data[place[: parameter.dim()]] = value
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", [UP, DOWN, "lm_head.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(name, value, dtype):
    refused(with_value(name, value, dtype), (name, "not finite", "(1, 2)"))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_norms_that_are_not_finite(value):
    refused(with_value(NORM, value, torch.float32), (NORM.removesuffix(".weight"),))


def constant_row(dtype, value, n=128):
    """Its sum, √n times the value, is an entry of the rotated row."""
    model = tiny("llama", hidden=n, intermediate=64, head_dim=32, heads=4, dtype=dtype)
    model.get_parameter(UP).data[3] = value
    model.get_parameter(NORM).data.fill_(1)
    return model


def test_float16_overflow_is_refused_and_what_fits_is_not():
    refused(
        constant_row(torch.float16, 8000), (UP, "9.05e+04", "65504", "6.55e+04", "bfloat16")[:2]
    )
    fits = constant_row(torch.float16, 5000)  # 56,569
    two = constant_row(torch.float16, 5000)
    two.get_parameter(UP).data[4] = 5000
    bound = float(torch.linalg.vector_norm(two.get_parameter(UP).detach().float()))
    assert bound > 65504  # so this one was decided by trial
    for model in (fits, two):
        fastrot.apply(model, "R1")
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_norm_times_a_weight_that_overflows():
    model = tiny("llama", dtype=torch.float16)
    model.get_parameter(NORM).data.fill_(400)
    model.get_parameter(UP).data.fill_(200)  # 80,000
    refused(model, (UP, "float16", "R1"))
    wide = copy.deepcopy(model).float()
    fastrot.apply(wide, "R1")
    assert wide.get_parameter(UP).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_numbers_of_wide_dtypes(dtype):
    big = torch.finfo(dtype).max / 2
    model = tiny("llama", dtype=dtype)
    model.get_parameter(UP).data[1] = big
    refused(model, (UP, "once rotated"), ("R1",))


def test_float16_that_rounds_away():
    """A norm of 2e-4 is a number like any other, but not times a weight of 0.05."""
    model = tiny("llama", dtype=torch.float16)
    model.get_parameter(NORM).data.fill_(2e-4)
    model.get_parameter(UP).data.mul_(0.05)
    refused(model, ("mlp", "float16", "%"))
    ids = random_ids(model, 2, 8, seed=0)
    wide = model.float()
    expected = logits(wide, ids)
    fastrot.apply(wide, "R1")
    assert relative_error(logits(wide, ids), expected) <= 1e-5


def test_small_weights_of_float16_are_no_reason():
    """Not the folding made them small: the model itself rounds as coarsely."""
    model = tiny("llama", dtype=torch.float16)
    model.get_parameter(UP).data.mul_(1e-4)
    fastrot.apply(model, EVERY)


def layer_norm_model(gamma, beta, dtype=torch.float32, name="gpt2"):
    model = build(FAMILIES[name], dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data[3], module.bias.data[3] = gamma, beta
    return model


@pytest.mark.parametrize("gamma", [0.0, 1e-8, 1e-6, 1e-4])
def test_a_bias_over_a_tiny_weight_is_refused(gamma):
    refused(layer_norm_model(gamma, 0.3), ("bias", "channel 3", "leave R1 out"), ("R1",))


@pytest.mark.parametrize(("dtype", "gamma"), [(torch.float64, 1e-4), (torch.float32, 2e-3)])
def test_what_is_let_pass_keeps_the_promise(dtype, gamma):
    """Just inside of the limit; the promise is 1e-12 and 1e-5."""
    model = layer_norm_model(gamma, 0.3, dtype)
    given = inputs(FAMILIES["gpt2"], model)
    with torch.no_grad():
        expected = model(**given).logits.double()
        fastrot.apply(model, "R1")
        error = relative_error(model(**given).logits, expected)
    assert error <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_dead_channel_is_carried():
    """Neither weight nor bias: nothing is divided by zero."""
    model = layer_norm_model(0.0, 0.0, torch.float64)
    given = inputs(FAMILIES["gpt2"], model)
    with torch.no_grad():
        expected = model(**given).logits.double()
        fastrot.apply(model, "R1")
        assert relative_error(model(**given).logits, expected) <= 1e-12


@pytest.mark.parametrize("gamma", [0.0, 1e-8])
def test_zero_and_tiny_norms_without_a_bias_are_exact(gamma):
    model = tiny("llama", dtype=torch.float64)
    model.get_parameter(NORM).data[5] = gamma
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, EVERY)
    assert relative_error(logits(model, ids), expected) <= 1e-6


@pytest.mark.parametrize("rotation", ["R3", "R4"])
def test_online_in_float16_is_finite_where_the_input_is(rotation):
    model = tiny("llama", dtype=torch.float16, intermediate=128, hidden=96, head_dim=64)
    fastrot.apply(model, rotation)
    layer = model.model.layers[0]
    module = (
        layer.mlp.fastrot_down_proj_input if rotation == "R4" else layer.self_attn.fastrot_q_attn
    )
    size = module.rotation.size
    x = torch.full((2, size), 60000.0, dtype=torch.float16)
    x[1] = torch.randn(size).half()
    y = module(x)
    assert y.isfinite().all()
    assert y[0].abs().max() == 65504
    exact = x[1].double() @ module.rotation.matrix()
    assert relative_error(y[1], exact) <= 1e-3
    x[0, 0] = float("nan")  # what is not finite stays so
    assert not module(x)[0].isfinite().all()


def massive(channel_rms, dtype=torch.bfloat16):
    model = tiny("llama", dtype=dtype)
    model.model.embed_tokens.weight.data[:, 7] *= channel_rms
    return model


def test_the_plan_warns_of_massive_channels():
    calm, wild = massive(1), massive(200)
    assert fastrot.plan(calm, EVERY).notes == ()
    made = fastrot.plan(wild, EVERY)
    assert "massive" in made.notes[0]
    assert "note: a few channels" in str(made)
    assert fastrot.plan(massive(200, torch.float32), EVERY).notes == ()
    assert fastrot.plan(wild, ("R2", "R3", "R4")).notes == ()
    with pytest.warns(fastrot.PrecisionWarning, match="massive"):
        fastrot.apply(wild, EVERY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrot.apply(calm, EVERY)


@pytest.mark.parametrize("factor", [1, 30, 300])
def test_the_prediction_is_the_growth_to_a_small_factor(factor):
    """bfloat16's error against the same model in float64, rotated over unrotated."""
    model = massive(factor)
    ids = random_ids(model, 8, 32, seed=0)
    exact = logits(copy.deepcopy(model).double(), ids)
    own = relative_error(logits(model, ids), exact)
    predicted = dynamic_range(model, fastrot.plan(model, "R1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastrot.PrecisionWarning)
        fastrot.apply(model, "R1")
    growth = relative_error(logits(model, ids), exact) / own
    assert growth <= 1.5 * predicted


def test_a_model_whose_embedding_transformers_does_not_find():
    """Names of the user's own: its other weights tell of massive channels."""

    class Unnamed(LlamaForCausalLM):
        def get_input_embeddings(self):
            raise NotImplementedError

    model = tiny("llama", dtype=torch.bfloat16)
    model.__class__ = Unnamed
    assert fastrot.plan(model, "R1").notes == ()
    fastrot.apply(model, "R1")
