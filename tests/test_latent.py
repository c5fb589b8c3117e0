"""Latent attention: R3 rotates the latent that is cached, in the weights, nothing online."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from helpers import difference, fingerprint, random_ids, relative_error
from test_zoo import WithoutCasts, config_of, logits
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot.checkpoint.tasks import _inside
from fastrot.edits import Part, Rotate
from fastrot.lab.cache import watched
from fastrot.lab.evaluate import Difference
from fastrot.lab.quantized import quantized
from fastrot.learning import learner
from fastrot.mapping import NormMapping, find_architecture
from fastrot.rotations import Rotation

LATENT = [
    name
    for name, family in FAMILIES.items()
    if find_architecture(config_of(name)).mapping.latent_writers
]
SIGNED = {"transform_type": "random-hadamard"}


def caught(model, given):
    """What enters the cache, by layer: latents ``(batch, 1, length, rank)``, and keys."""
    found = {}

    def watch(layer, latents, keys):
        found[layer] = latents.clone(), keys.clone()
        return latents, keys

    with torch.no_grad(), watched(model, watch):
        model(**given)
    return found


def outputs(model, names, given):
    """What norms put out."""
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output.clone()})
        )
        for name in names
    ]
    logits(model, given)
    for hook in hooks:
        hook.remove()
    return found


def uneven(name, dtype=torch.float64):
    """Two channels of every latent are massive, and the norm behind it lets them be."""
    model = build(FAMILIES[name], dtype)
    for key, parameter in model.named_parameters():
        if key.endswith("kv_a_proj_with_mqa.weight"):
            parameter.data[3:5] *= 50
    return model


def test_they_are_many():
    assert {"deepseek_v3", "kimi_linear", "longcat_flash", "hy_v4", "minicpm3"} <= set(LATENT)
    assert len(LATENT) >= 18


@pytest.mark.parametrize("name", LATENT)
def test_the_latent_is_turned_and_nothing_else_is(name):
    """After the norm: before, without its scale, times the dense matrix; logits as they were."""
    model = build(FAMILIES[name])
    given = inputs(FAMILIES[name], model)
    with WithoutCasts():
        plan = fastrot.plan(model, "R3", randomize=True, **SIGNED)
        norms = [norm.name for norm in plan.norms]
        before, expected = outputs(model, norms, given), logits(model, given)
        scales = {norm: model.get_submodule(norm).weight.detach().clone() for norm in norms}
        readers = {step.norm: edit for edit in plan.weights for step in edit.steps[:-1]}
        fastrot.apply(model, plan)
        after = outputs(model, norms, given)
        assert relative_error(logits(model, given), expected) <= 1e-12
    assert plan.online == ()
    assert not hasattr(model.config, "quantization_config")
    assert len(norms) == len(readers) > 0
    for norm in norms:
        (turn,) = (s for s in readers[f"{norm}.weight"].steps if isinstance(s, Rotate))
        wanted = before[norm] / scales[norm] @ turn.rotation.matrix()
        assert relative_error(after[norm], wanted) <= 1e-13
        assert relative_error(after[norm], before[norm] / scales[norm]) > 0.1


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3", "axk2"])
def test_what_is_cached(name):
    """The cache itself: latents turn, keys with positions stay."""
    model = build(FAMILIES[name], torch.float64)
    given = inputs(FAMILIES[name], model)
    with WithoutCasts():
        before = caught(model, given)
        weights = {
            key: value.clone() for key, value in model.state_dict().items() if "kv_a_lay" in key
        }
        plan = fastrot.apply(model, "R3", **SIGNED).plan
        after = caught(model, given)
    turn = next(s.rotation for e in plan.weights for s in e.steps if isinstance(s, Rotate))
    assert len(before) == len(weights) > 1
    for layer, scale in enumerate(weights.values()):
        (latent, key), (new, same) = before[layer], after[layer]
        assert relative_error(new, latent / scale @ turn.matrix()) <= 1e-12
        assert relative_error(same, key) <= 1e-12


def peak(latents):
    """Median of the greatest magnitude over the rms."""
    return float((latents.abs().amax(-1) / latents.square().mean(-1).sqrt()).median())


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_outliers_are_spread(name):
    model = uneven(name)
    given = inputs(FAMILIES[name], model)
    before = {layer: peak(latents) for layer, (latents, _) in caught(model, given).items()}
    alone, turned = copy.deepcopy(model), copy.deepcopy(model)
    fastrot.apply(alone, "R3", block_size={"R3": 1})  # folds, and turns nothing
    fastrot.apply(turned, "R3", **SIGNED)
    for layer, (latents, _) in caught(turned, given).items():
        assert before[layer] > 3.5
        assert peak(latents) < 0.75 * before[layer]
        assert peak(caught(alone, given)[layer][0]) > 3.5


def test_a_quantized_cache_loses_less():
    """Four bits for what is cached, on latents with massive channels."""
    errors = {}
    for rotations in (("R1", "R2"), ("R1", "R2", "R3")):
        model = uneven("minicpm3", torch.float32)
        given = inputs(FAMILIES["minicpm3"], model)
        exact = logits(model, given)
        fastrot.apply(model, rotations, **SIGNED)
        with quantized(model, "kv4"):
            errors[rotations] = relative_error(logits(model, given), exact)
    with_r3, without = errors["R1", "R2", "R3"], errors["R1", "R2"]
    assert with_r3 < 0.8 * without


def test_the_plan_of_deepseek():
    """Rows, bias and key: R3 touches the first rows alone, the reader takes the norm's scale."""
    model = build(FAMILIES["deepseek_v3"])
    plan = fastrot.plan(model, ("R1", "R2", "R3", "R4"))
    edits = {edit.parameter: edit for edit in plan.weights}
    block = "model.layers.0.self_attn"
    rank, rope = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    for leaf in ("weight", "bias"):
        (turn,) = (
            step
            for step in edits[f"{block}.kv_a_proj_with_mqa.{leaf}"].steps
            if getattr(step, "group", "") == "R3"
        )
        assert turn.part == Part(1, rank, rope)
        assert f"[{rank} before {rope}]" in str(turn)
    reader = [str(step) for step in edits[f"{block}.kv_b_proj.weight"].steps]
    assert [step.split()[0] for step in reader] == ["·", "R2", "R3"]
    assert f"{block}.kv_a_layernorm.weight" in plan.parameters
    # The queries' latent is not cached.
    assert not any("q_a_layernorm" in name or "q_b_proj" in name for name in plan.parameters)


def test_sizes():
    """Any size works or is refused by name; a random matrix or blocks are the way out."""
    rank = 29 * 2  # neither Sylvester, Paley nor Williamson
    for changes, settings in (
        ({"kv_lora_rank": 30}, None),
        ({"kv_lora_rank": rank}, {"block_size": {"R3": 2}}),
        ({"kv_lora_rank": rank}, {"transform_type": "random-matrix"}),
        ({"kv_lora_rank": 56}, {"block_size": {"R3": 8}}),
    ):
        model = build(FAMILIES["deepseek_v3"], **changes)
        given = inputs(FAMILIES["deepseek_v3"], model)
        before, state = logits(model, given), fingerprint(model)
        if settings is None:
            with pytest.raises(fastrot.HadamardSizeError, match=r"R3 of .*kv_a_proj_with_mqa"):
                fastrot.apply(model, "R3")
            assert difference(state, fingerprint(model)) == []
            continue
        fastrot.apply(model, ("R2", "R3"), precision=torch.float64, **settings)
        assert relative_error(logits(model, given), before) <= 1e-6


def roles_of(name, **changes):
    row = find_architecture(config_of(name))
    return replace(row.mapping, **changes), row.norms


def refused(match, model, **settings):
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=match):
        fastrot.apply(model, "R3", **settings)
    assert difference(before, fingerprint(model)) == []


def test_roles_of_a_user():
    model = build(FAMILIES["deepseek_v3"])
    mapping, norms = roles_of("deepseek_v3", lm_head=("lm_head",))
    given = inputs(FAMILIES["deepseek_v3"], model)
    before = logits(model, given)
    fastrot.apply(model, "R3", mappings=mapping, norm_mappings=norms)
    assert relative_error(logits(model, given), before) <= 1e-6


def test_what_a_user_leaves_out_is_refused():
    model = build(FAMILIES["deepseek_v3"])
    mapping, norms = roles_of("deepseek_v3")
    bare = replace(mapping, latent_writers=(), latent_readers=())
    refused("caches latents, not keys; name latent_writers", model, mappings=bare)
    unfed = [norm for norm in norms if "kv_a_layernorm" not in str(norm.norm)]
    refused("no norm mapping feeds .*kv_b_proj", model, mappings=mapping, norm_mappings=unfed)
    one = replace(mapping, latent_readers=())
    refused("latent_writers and latent_readers go together", model, mappings=one)
    none = replace(mapping, latent_writers=("re:.*none$",))
    with pytest.raises(fastrot.RotationError, match="none"):
        fastrot.apply(model, "R2", mappings=none, norm_mappings=norms)
    wrong = [*unfed, NormMapping(r"re:.*\.kv_a_layernorm$", mapping.latent_readers, offset=1.0)]
    refused("does not compute", model, mappings=mapping, norm_mappings=wrong)


def test_latents_of_several_sizes_are_refused():
    model = build(FAMILIES["deepseek_v3"])
    model.model.layers[1].self_attn.kv_lora_rank = 24
    refused("has a latent of size 24, .* one of 28; leave R3 out", model)
    model.model.layers[0].self_attn.kv_lora_rank = 24
    refused("has a latent of size 24, .* one of 28; leave R3 out", model)


def of_two_sizes(dtype=torch.float64):
    """A model of dots3 whose two layers have latents of 28 and 20."""
    family = FAMILIES.get("dots3_note")
    if family is None:
        pytest.skip("this transformers has no dots3_note")
    changes = copy.deepcopy(family.config["text_config"])
    changes["per_layer_config"][1]["kv_lora_rank"] = 20
    return build(family, dtype, text_config=changes)


def test_layers_may_differ():
    """Each with a rotation of its own size."""
    model = of_two_sizes()
    given = inputs(FAMILIES["dots3_note"], model)
    with WithoutCasts():
        before = logits(model, given)
        plan = fastrot.apply(model, ("R2", "R3"), randomize=True, **SIGNED).plan
        assert relative_error(logits(model, given), before) <= 1e-12
    turns = [step for edit in plan.weights for step in edit.steps if isinstance(step, Rotate)]
    assert {turn.rotation.size for turn in turns if turn.group == "R3"} == {28, 20}


def test_a_latent_wider_than_what_writes_it_is_refused():
    model = build(FAMILIES["deepseek_v3"])
    for layer in model.model.layers:
        layer.self_attn.kv_lora_rank = 37
    refused("has 36 rows, and a latent of size 37", model)


def test_latents_that_layers_share_are_refused():
    name = next((n for n, f in FAMILIES.items() if "mistral_large4" in f.model_type), None)
    if name is None:
        pytest.skip("this transformers has no mistral_large4")
    refused("layers use the latents of others", build(FAMILIES[name]))


def test_it_is_no_online_rotation():
    """R3 stays as R1 and R2 do; R4 comes off and the function stays."""
    model = build(FAMILIES["deepseek_v3"])
    given = inputs(FAMILIES["deepseek_v3"], model)
    before = logits(model, given)
    fastrot.apply(model, ("R1", "R2", "R3", "R4"))
    with pytest.raises(fastrot.RotationError, match=r"R3 is not online .*\(online: R4\)"):
        fastrot.remove(model, "R3")
    fastrot.remove(model)
    assert relative_error(logits(model, given), before) <= 1e-6
    with pytest.raises(fastrot.RotationError, match="R3 is already on this"):
        fastrot.apply(model, "R3")


def test_undone_after_an_error(monkeypatch):
    model = build(FAMILIES["deepseek_v3"])
    before = fingerprint(model)
    plan = fastrot.plan(model, "R3")
    last = model.get_submodule(plan.norms[-1].name).weight
    fill = torch.Tensor.fill_

    def failing(self, value):
        if self is last:
            raise OSError("a failing memory bank")
        return fill(self, value)

    monkeypatch.setattr(torch.Tensor, "fill_", failing)
    with pytest.raises(OSError, match="memory bank"):
        fastrot.apply(model, plan, undo="memory")
    assert difference(before, fingerprint(model)) == []


def test_parts():
    """The pieces of a dimension lie side by side and cover it; inside are those of the part."""
    for groups, before, size, behind in itertools.product((1, 3), (0, 2), (1, 4), (0, 5)):
        length = groups * (before + size + behind)
        pieces = [*Part(groups, size, behind).pieces(length)]
        ends = [piece.stop for piece, _ in pieces]
        assert [piece.start for piece, _ in pieces] == [0, *ends[:-1]]
        assert ends[-1] == length
        inside = [n for piece, within in pieces if within for n in range(piece.start, piece.stop)]
        each = before + size + behind
        assert inside == [n for n in range(length) if before <= n % each < before + size]


def test_a_checkpoint_may_cut_a_dimension():
    """A tensor with the latent's rows, one with the key's, one with both; none that cuts it."""
    turn = Rotate(0, Rotation("hadamard", 28), False, "R3", Part(1, 28, 8))
    assert _inside(turn, (0, 36), 36) == turn
    assert _inside(turn, (0, 28), 36) == replace(turn, part=Part(1, 28))
    assert _inside(turn, (0, 30), 36) == replace(turn, part=Part(1, 28, 2))
    assert _inside(turn, (28, 36), 36) is None
    with pytest.raises(fastrot.RotationError, match="cuts"):
        _inside(turn, (0, 20), 36)
    heads = replace(turn, part=Part(3, 4, 2))
    assert _inside(heads, (0, 14), 21) == replace(heads, part=Part(2, 4, 2))


def test_learned_for_a_latent(monkeypatch):
    """R3 learns from the latents; R2 has none of its values in the cache."""
    monkeypatch.setattr(learner, "compare", lambda *_: Difference(-1.0, 0.0))
    model = build(FAMILIES["minicpm3"])
    text = random_ids(model, 16, 12, seed=0)
    learned = fastrot.learn(model, text, ("R2", "R3"), scheme="kv4", steps=5, vectors=64)
    assert {name: [m.size for m in each] for name, each in learned.matrices.items()} == {
        "R3": [model.config.kv_lora_rank] * model.config.num_hidden_layers
    }
    given = inputs(FAMILIES["minicpm3"], model)
    before = logits(model, given)
    with pytest.raises(fastrot.RotationError, match="turn nothing that kv4 rounds"):
        fastrot.learn(model, text, ("R2",), scheme="kv4", steps=5, vectors=64)
    fastrot.apply(model, learned)
    assert relative_error(logits(model, given), before) <= 1e-6
