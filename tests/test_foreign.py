"""Code that the tables do not know is refused by name where a rotation acts, and nowhere else."""

import copy
import functools
import gc
import types

import pytest
import torch
from accelerate.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot.foreign import check_whole

STREAM = ("R1",)
BLOCK = ("R4",)


class Norming(LlamaModel):
    """Norms the embedding: another function under a known model type."""

    def forward(self, input_ids=None, **kwargs):
        embeds = nn.functional.normalize(self.embed_tokens(input_ids), dim=-1)
        return super().forward(inputs_embeds=embeds, **kwargs)


class Reader(LlamaMLP):
    """Uses the weight of its down projection past the module."""

    def forward(self, x):
        act = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return nn.functional.linear(act, self.down_proj.weight, self.down_proj.bias)


class Called(LlamaMLP):
    """Another function by its call, under a forward of transformers."""

    def __call__(self, x):
        return super().__call__(x).relu()


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Plain(LlamaForCausalLM):
    """A subclass whose forwards are those of transformers."""

    def describe(self):
        return "mine"


def steer(module, args, output):
    return output + 1


def own_forward(module):
    forward = module.forward
    module.forward = functools.wraps(forward)(lambda *a, **k: forward(*a, **k) * 2)


def subclass(path, kind):
    def change(model):
        model.get_submodule(path).__class__ = kind

    return change


FIRST = "model.layers.0"
STRANGERS = {
    "steering": (lambda m: m.get_submodule(FIRST).register_forward_hook(steer), FIRST, STREAM),
    "pre-hook of the stream": (
        lambda m: m.model.norm.register_forward_pre_hook(lambda *_: None),
        "model.norm",
        STREAM,
    ),
    "hook on the embedding": (
        lambda m: m.model.embed_tokens.register_forward_hook(steer),
        "model.embed_tokens",
        STREAM,
    ),
    "forward of a norm": (lambda m: own_forward(m.model.norm), "model.norm", STREAM),
    "forward of a linear": (
        lambda m: own_forward(m.get_submodule(f"{FIRST}.mlp.up_proj")),
        f"{FIRST}.mlp.up_proj",
        STREAM,
    ),
    "subclass of the model": (subclass("model", Norming), "model", STREAM),
    "subclass of an MLP": (subclass(f"{FIRST}.mlp", Reader), f"{FIRST}.mlp", BLOCK),
    "call of an MLP": (subclass(f"{FIRST}.mlp", Called), f"{FIRST}.mlp", BLOCK),
    "linear that is none": (
        subclass(f"{FIRST}.mlp.down_proj", Clipped),
        f"{FIRST}.mlp.down_proj",
        BLOCK,
    ),
    "hook behind a down projection": (
        lambda m: m.get_submodule(f"{FIRST}.mlp.down_proj").register_forward_hook(steer),
        f"{FIRST}.mlp.down_proj",
        BLOCK,
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_strangers_are_refused_by_name(case):
    change, where, rotations = STRANGERS[case]
    model = tiny("llama")
    fastrot.plan(model, rotations)
    change(model)
    before = fingerprint(model)
    for action in (fastrot.plan, fastrot.apply):
        with pytest.raises(fastrot.ForeignCodeError, match=r"trust=True") as caught:
            action(model, rotations)
        assert str(caught.value).startswith(f"{where} (")
        assert "test_foreign" in str(caught.value)
    assert difference(before, fingerprint(model)) == []
    fastrot.apply(model, rotations, trust=True)


def test_what_does_not_touch_a_rotation_is_let_pass():
    """R4 lies inside its MLP: steering the stream is nothing to it."""
    model = tiny("llama")
    model.get_submodule(FIRST).register_forward_hook(
        lambda m, a, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1
    )
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, ("R2", "R3", "R4"))
    assert relative_error(logits(model, ids), expected) <= 1e-5


def test_a_subclass_with_the_forwards_of_transformers_is_known():
    model = tiny("llama")
    model.__class__ = Plain
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, ("R1", "R2", "R3", "R4"))
    assert relative_error(logits(model, ids), expected) <= 1e-5


def test_who_describes_a_class_knows_it():
    """With mappings the class is the user's to describe; a hook is still asked for."""
    from fastrot.mapping import find_architecture

    model = tiny("llama")
    row = find_architecture(model.config)
    subclass(f"{FIRST}.mlp", types.new_class("Mine", (Reader,)))(model)
    described = {"mappings": row.mapping, "norm_mappings": row.norms}
    fastrot.plan(model, "R1", **described)
    model.model.norm.register_forward_hook(steer)
    with pytest.raises(fastrot.ForeignCodeError, match="hook"):
        fastrot.plan(model, "R1", **described)


def test_global_hooks():
    model = tiny("llama")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(fastrot.ForeignCodeError, match="global"):
            fastrot.plan(model)
    finally:
        handle.remove()
    fastrot.plan(model)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def test_hooks_of_accelerate():
    """Its own move data; one of the user's may write."""
    model = tiny("llama")
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    add_hook_to_module(model.model.norm, ModelHook())
    fastrot.apply(model, ("R1", "R4"))
    assert relative_error(logits(model, ids), expected) <= 1e-5
    other = tiny("llama")
    add_hook_to_module(other.model.norm, Doubling())
    with pytest.raises(fastrot.ForeignCodeError, match="Doubling"):
        fastrot.apply(other, "R1")


@pytest.mark.parametrize("hidden", ["forward", "hook"])
def test_what_hooks_of_accelerate_hide(hidden):
    """A forward that they keep, a hook inside a sequence of sequences."""
    model = tiny("llama")
    if hidden == "forward":
        own_forward(model.model.norm)
        add_hook_to_module(model.model.norm, ModelHook())
    else:
        mlp = model.get_submodule(f"{FIRST}.mlp")
        add_hook_to_module(mlp, SequentialHook(ModelHook(), SequentialHook(Doubling())))
    with pytest.raises(fastrot.ForeignCodeError, match="test_foreign"):
        fastrot.apply(model, "R1" if hidden == "forward" else "R4")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_replaced_forward_in_which_a_rotation_would_act(hidden, trust):
    """Trust can't help: the rotation takes its place, and what it did would be lost."""
    model = tiny("llama")
    mlp = model.get_submodule(f"{FIRST}.mlp")
    own_forward(mlp)
    if hidden:
        add_hook_to_module(mlp, ModelHook())
    before = fingerprint(model)
    for action in (fastrot.plan, fastrot.apply):
        with pytest.raises(
            fastrot.RotationError, match=f"the forward of {FIRST}.mlp .*which was replaced"
        ):
            action(model, "R4", trust=trust)
    assert difference(before, fingerprint(model)) == []
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(model, "R1", trust=True)
    assert relative_error(logits(model, ids), expected) <= 1e-5


def test_hooks_of_accelerate_on_described_classes():
    """The forward that they keep is that of the user's class."""
    from fastrot.mapping import find_architecture

    model = tiny("llama")
    row = find_architecture(model.config)
    subclass(f"{FIRST}.mlp", Reader)(model)
    add_hook_to_module(model.get_submodule(f"{FIRST}.mlp"), ModelHook())
    fastrot.plan(model, "R1", mappings=row.mapping, norm_mappings=row.norms)


class Noise(nn.Module):
    def forward(self, x):
        return x.relu()


PASSED = {
    "gpt2": (
        "transformer.drop",
        "transformer.h.0.mlp.dropout",
        "transformer.h.0.attn.resid_dropout",
    ),
    "gpt_neox": ("gpt_neox.emb_dropout", "gpt_neox.layers.0.post_mlp_dropout"),
    "olmo": ("model.norm", "model.layers.0.input_layernorm"),
    "nemotron_h": ("model.layers.1.mixer.fc1_latent_proj",),
    "phi3": ("model.layers.0.resid_attn_dropout",),
}


@pytest.mark.parametrize("family", PASSED)
def test_what_has_no_weights_but_passes_the_stream(family):
    for where in PASSED[family]:
        # Whether a norm is one is tried.
        for change in ("hook", "class") if "drop" in where else ("hook",):
            model = build(FAMILIES[family], torch.float32)
            fastrot.plan(model, "R1")
            if change == "hook":
                model.get_submodule(where).register_forward_hook(steer)
            else:
                owner, _, leaf = where.rpartition(".")
                setattr(model.get_submodule(owner), leaf, Noise())
            with pytest.raises(fastrot.ForeignCodeError, match=rf"^{where} \("):
                fastrot.plan(model, "R1")


def test_hooks_inside_a_block_are_nothing_to_the_stream():
    model = build(FAMILIES["gpt2"], torch.float32)
    for path in ("mlp.act", "attn.attn_dropout"):
        model.transformer.h[0].get_submodule(path).register_forward_hook(steer)
    given = inputs(FAMILIES["gpt2"], model)
    with torch.no_grad():
        expected = model(**given).logits
        fastrot.apply(model, "R1")
        assert relative_error(model(**given).logits, expected) <= 1e-5


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        Counting.calls += 1
        return args, kwargs


@pytest.mark.parametrize("late", [False, True], ids=["hook first", "R4 first"])
def test_experts_keep_hooks_of_accelerate(late):
    family = FAMILIES["mixtral"]
    model = build(family, torch.float32)
    given = inputs(family, model)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        expected = model(**given).logits
        if late:
            fastrot.apply(model, "R4")
        add_hook_to_module(experts, Counting())
        if not late:
            fastrot.apply(model, "R4", trust=True)

        def works():
            Counting.calls = 0
            same = relative_error(model(**given).logits, expected) <= 1e-5
            return same and Counting.calls == 1

        assert works()
        fastrot.remove(model)
        assert works()
        remove_hook_from_module(experts)
        assert relative_error(model(**given).logits, expected) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_parts_of_a_larger_model_are_refused(name):
    family = FAMILIES[name]
    model = build(family, torch.float32)
    part = model.model if name == "llama" else model.model.language_model
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match="pass that model as a whole"):
        fastrot.apply(part, "R4")
    assert difference(before, fingerprint(model)) == []
    alone = copy.deepcopy(part)
    fastrot.apply(alone, "R4")
    assert alone.config.fastrot


def test_a_part_that_another_model_shares_is_refused():
    """It would be rotated under the other's head, without a word in the other's record."""
    model = tiny("llama")
    other = LlamaForSequenceClassification(model.config)
    other.model = model.model
    before = fingerprint(model)
    for rotated, name in ((model, "SequenceClassification"), (other, "CausalLM")):
        with pytest.raises(fastrot.RotationError, match=rf"'model' of a LlamaFor{name} is a part"):
            fastrot.apply(rotated)
    assert difference(before, fingerprint(model)) == []
    fastrot.apply(model, trust=True)
    alone = tiny("llama")
    third = LlamaForSequenceClassification(alone.config)
    third.model = alone.model
    del third
    fastrot.apply(alone)


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.model])
def test_what_a_shallow_copy_shares_is_refused(of):
    """``copy.copy`` shares the dict of children itself, so that these have no more holders."""
    model = tiny("llama")
    twin = copy.copy(of(model))
    with pytest.raises(fastrot.RotationError, match="is a part of this LlamaForCausalLM too"):
        fastrot.apply(model)
    del twin
    fastrot.apply(model)


def test_a_head_that_another_model_shares_is_refused():
    model, other = tiny("llama"), tiny("llama")
    other.lm_head = model.lm_head
    with pytest.raises(fastrot.RotationError, match="'lm_head' of a LlamaForCausalLM is a part"):
        fastrot.apply(model)
    fastrot.apply(model, trust=True)


def test_only_what_others_hold_is_looked_for_among_all_objects(monkeypatch):
    """Which takes longer than all other checks."""
    asked = []
    everything = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: asked.append(1) or everything())
    check_whole(model := tiny("llama"))
    assert not asked
    layers = model.model.layers
    check_whole(model)
    assert len(asked) == 1
    check_whole(model, trust=True)
    assert len(asked) == 1
    with pytest.raises(fastrot.RotationError, match="'model' of a LlamaForCausalLM"):
        check_whole(model.model, trust=True)
    assert len(asked) == 2
    assert len(layers) == len(model.model.layers)


def test_models_that_are_being_made_elsewhere_are_no_obstacle():
    """An object without modules yet, as while another thread copies or unpickles a model."""
    unborn = LlamaForCausalLM.__new__(LlamaForCausalLM)
    fastrot.apply(tiny("llama"), "R2")
    del unborn


@pytest.mark.parametrize(
    ("wrap", "word"),
    [(checkpoint_wrapper, "_checkpoint_wrapped_module"), (torch.compile, "_orig_mod")],
)
@pytest.mark.parametrize("rotations", [STREAM, BLOCK])
def test_a_wrapped_layer_is_not_left_out(wrap, word, rotations):
    """Of R4 alone it was, in silence: the other layers have the role."""
    model = tiny("llama")
    layer = model.model.layers[0]
    layer.mlp = wrap(layer.mlp)
    before = fingerprint(model)
    with pytest.raises(fastrot.UnsupportedRotationError, match=rf"layers\.0\.mlp of .*{word}"):
        fastrot.apply(model, rotations)
    assert fingerprint(model) == before
    fastrot.apply(model, ("R2",))  # which has no part in it


def test_what_is_compiled_in_place_is_rotated():
    model = tiny("llama")
    model.model.layers[0].compile(backend="eager")
    ids = random_ids(model, 2, 7, seed=0)
    want = logits(model, ids)
    fastrot.apply(model, BLOCK)
    assert relative_error(logits(model, ids), want) < 1e-5
