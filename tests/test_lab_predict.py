"""What rounding is predicted to cost: against the divergence that it causes."""

import pytest
import torch
from helpers import difference, fingerprint, random_ids, tiny
from torch.nn.functional import kl_div
from transformers import LlamaForCausalLM
from zoo import FAMILIES, build

import fastrot
from fastrot.demo.corpus import heldout_files, read_bytes
from fastrot.demo.evaluate import MODEL
from fastrot.lab.corpus import cut
from fastrot.lab.outliers import outliers
from fastrot.lab.predict import PLACES, predict
from fastrot.lab.quantized import quantized
from fastrot.lab.schemes import Scheme

ROUNDED = {
    "w6": {"weights"},
    "a6": {"attention", "o", "mlp", "down"},
    "kv4": {"keys", "values"},
    "nvfp4": {"weights", "attention", "o", "mlp", "down"},
    "w6gptq-a6": {"attention", "o", "mlp", "down"},
}


def schemes(*names):
    return {name: Scheme.parse(name) for name in names}


@pytest.fixture(scope="module")
def trained():
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, cut(torch.tensor(read_bytes(heldout_files())).long(), 128, 8 * 128)


def words(model, text):
    with torch.no_grad():
        return model(text).logits.log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("rotations", [(), ("R1", "R2", "R3", "R4")])
def test_the_sum_is_the_divergence_to_a_factor_of_two(trained, rotations):
    """Of the words of the rounded model from its own: targets are drawn, not given."""
    model, text = trained
    if rotations:
        fastrot.apply(model, rotations)
    names = ("w6", "a6", "kv4")
    found = predict(model, text, schemes(*names))
    exact = words(model, text)
    for name in names:
        with quantized(model, name):
            rounded = words(model, text)
        diverges = float(kl_div(rounded, exact, log_target=True, reduction="batchmean"))
        assert 0.5 < sum(found[name].values()) / diverges < 2, name


def test_places_are_those_that_a_scheme_rounds():
    model = tiny("llama", dtype=torch.float32)
    before, state = fingerprint(model), torch.random.get_rng_state()
    text = random_ids(model, 2, 12, seed=0)
    seen = []
    found = predict(model, text, schemes(*ROUNDED), done=seen.append)
    assert {name: set(costs) for name, costs in found.items()} == ROUNDED
    assert all(cost > 0 for costs in found.values() for cost in costs.values())
    assert set(PLACES) - set().union(*ROUNDED.values()) == {"latents", "positions"}
    assert seen == [12, 12]
    assert difference(before, fingerprint(model)) == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert predict(model, text, schemes(*ROUNDED)) == found


@pytest.mark.parametrize(
    ("scheme", "place"),
    [
        ("w4g48", r"model\.layers\.0\.mlp\.down_proj\.weight"),
        ("a4g48", "down of layer 0"),
        ("kv4g64", "keys of layer 0"),
    ],
)
def test_a_group_that_does_not_fit_is_named(scheme, place):
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(fastrot.RotationError, match=f"^scheme {scheme}, {place}: .* groups of"):
        predict(model, random_ids(model, 1, 12, seed=0), schemes("w8a8kv8", scheme))


def test_no_words_are_drawn_from_what_is_not_finite():
    model = tiny("llama", dtype=torch.float32)
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(fastrot.RotationError, match="logits of LlamaForCausalLM are not finite"):
        predict(model, random_ids(model, 1, 12, seed=0), schemes("a4"))


@pytest.mark.parametrize(("name", "shared"), [("gptj", True), ("falcon_two_norms", False)])
def test_noise_on_a_tensor_with_two_readers_counts_once(name, shared):
    model = build(FAMILIES[name], torch.float32)
    found = predict(model, random_ids(model, 2, 12, seed=0), schemes("a6"))["a6"]
    assert set(found) == ROUNDED["a6"] - ({"mlp"} if shared else set())
    assert set(outliers(model, random_ids(model, 2, 12, seed=0))) >= ROUNDED["a6"]


def test_models_that_write_into_their_embedding():
    model = build(FAMILIES["ctrl"], torch.float32)
    assert predict(model, random_ids(model, 2, 12, seed=0), schemes("w6"))["w6"]["weights"] > 0


@pytest.mark.parametrize("name", ["openai-gpt", "xlstm"])
def test_models_without_keys_and_values(name):
    model = build(FAMILIES[name], torch.float32)
    ids = random_ids(model, 2, 12, seed=0)
    if name != "xlstm":  # which writes into what gradients need
        assert set(predict(model, ids, schemes("a6"))["a6"]) <= ROUNDED["a6"]
    assert not {"keys", "values"} & set(outliers(model, ids))
    with quantized(model, "w4"):
        model(ids)
    with pytest.raises(fastrot.RotationError, match="keeps no keys and values in a cache"):
        quantized(model, "kv4").__enter__()


def test_latents_cost_what_keys_and_values_would():
    model = build(FAMILIES["minicpm3"], torch.float32)
    found = predict(model, random_ids(model, 1, 12, seed=0), schemes("kv4"))
    assert set(found["kv4"]) == {"latents", "positions"}
    assert min(found["kv4"].values()) > 0


def test_a_quarter_of_the_step_costs_a_sixteenth():
    model = build(FAMILIES["gpt2"], torch.float32)  # its weights are transposed
    found = predict(model, random_ids(model, 2, 12, seed=0), schemes("w6a6", "w8a8"))
    for place, cost in found["w6a6"].items():
        assert cost / found["w8a8"][place] == pytest.approx(16, rel=0.35)
