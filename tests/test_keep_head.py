"""R1 that leaves embedding, last norm and head alone: ``keep_head=True``."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from helpers import logits as logits_of
from helpers import perturb, random_ids, relative_error, tiny
from safetensors.torch import load_file, save_file
from test_zoo import WithoutCasts, first_of_each_row, logits
from transformers import AutoModel, AutoModelForCausalLM
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot.cli import main
from fastrot.online import installed

SOME = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "qwen3_moe", "llava", "qwen3_vl")
KEEP = fastrot.Recipe(
    ("R1", "R2"), transform_type="random-hadamard", keep_head=True, precision=torch.float64
)
ENDS = (
    "embed_tokens",
    "wte",
    "wpe",
    "model.norm.",
    "ln_f",
    "lm_head",
    "projector",
    "visual.merger",
)
"""Parts of names that no rotation may touch."""


def model_of(name, dtype=torch.float64):
    """A family's model, the tied or untied one by the name."""
    if name.startswith("llama-"):
        model = tiny("llama", tied=name == "llama-tied", dtype=dtype)
        return model, {"input_ids": random_ids(model, 2, 16, seed=0)}
    model = build(FAMILIES[name], dtype)
    return model, inputs(FAMILIES[name], model)


def row_of(model):
    return fastrot.mapping.find_architecture(model.config)


def ends_of(model):
    return {n: p for n, p in model.named_parameters() if any(end in n for end in ENDS)}


def exact(name):
    model, given = model_of(name)
    kept = {n: p.detach().clone() for n, p in ends_of(model).items()}
    with WithoutCasts():
        before = logits(model, given)
        fastrot.apply(model, KEEP)
        assert relative_error(logits(model, given), before) <= 1e-12
    assert kept
    assert all(torch.equal(model.get_parameter(n), value) for n, value in kept.items())


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", *SOME])
def test_exact_and_the_ends_are_untouched(name):
    exact(name)


NOT_THERE = {
    **dict.fromkeys(("nanochat", "olmo", "olmo_clipped"), "has no weight"),
    **dict.fromkeys(("hrm_text", "idefics"), "the layers of .* are in"),
    "granite4_vision": "image_newline.* of Granite4Vision.* may write before it and between others",
}
"""Families whose ends can't be left alone, and how the refusal says why."""


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each_row())
def test_every_row_of_the_tables(name):
    model, given = model_of(name)
    with WithoutCasts():
        before = logits(model, given)
        if name in NOT_THERE or "R1" in row_of(model).refuses:
            with pytest.raises(fastrot.RotationError, match=NOT_THERE.get(name, "R1 of")):
                fastrot.plan(model, "R1", keep_head=True)
            return
        fastrot.apply(model, "R1", keep_head=True, precision=torch.float64)
        assert relative_error(logits(model, given), before) <= 1e-12


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "llava"])
def test_greedy_tokens_and_saving(name, tmp_path):
    model, given = model_of(name, torch.float32)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(**given, **settings)
    model.save_pretrained(tmp_path / "original")
    fastrot.apply(model, fastrot.Recipe(("R1", "R2", "R3", "R4"), keep_head=True))
    assert torch.equal(model.generate(**given, **settings), tokens)
    model.save_pretrained(tmp_path / "rotated")
    loaded = type(model).from_pretrained(tmp_path / "rotated", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, given), logits(model, given))
    assert loaded.config.fastrot == model.config.fastrot
    before, after = (
        (tmp_path / folder / "model.safetensors").stat().st_size
        for folder in ("original", "rotated")
    )
    assert before < after < 1.01 * before


def test_ties_stay():
    model = tiny("llama", tied=True)
    fastrot.apply(model, KEEP)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    table = str(fastrot.plan(tiny("llama", tied=True), "R1"))
    assert "untied from model.embed_tokens.weight (keep_head=True leaves them tied)" in table


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "qwen3_vl"])
def test_neither_end_can_be_left_out(name):
    model, given = model_of(name)
    before = logits(model, given)
    plan = fastrot.plan(model, KEEP)
    assert [site.location for site in plan.online].count("input") == 2
    for site in plan.online:
        changed = copy.deepcopy(model)
        fastrot.apply(changed, replace(plan, online=tuple(s for s in plan.online if s != site)))
        assert relative_error(logits(changed, given), before) > 1e-3, site


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("keep_head", [True, False])
def test_remove_turns_r1_back_if_it_is_named(name, keep_head):
    model, given = model_of(name)
    before = logits(model, given)
    names = set(model.state_dict())
    fastrot.apply(model, ("R1", "R4"), keep_head=keep_head)
    fastrot.remove(model)
    if not keep_head and name in ("llama-tied", "gpt2"):
        with pytest.raises(fastrot.RotationError, match="R1 is not online"):
            fastrot.remove(model, "R1")
        return
    assert {rotation.group for _, _, rotation in installed(model)} == {"R1"}
    fastrot.remove(model, "R1")
    assert not list(installed(model))
    assert set(model.state_dict()) == names
    assert relative_error(logits(model, given), before) <= 1e-6
    assert not hasattr(model.config, "quantization_config")
    fastrot.apply(model, "R1", keep_head=True, seed=3, transform_type="random-hadamard")
    assert relative_error(logits(model, given), before) <= 1e-6


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_copies(duplicate):
    model, given = model_of("llama-tied")
    fastrot.apply(model, KEEP)
    assert torch.equal(logits(duplicate(model), given), logits(model, given))


def test_it_compiles_in_one_graph():
    model, given = model_of("llama-tied", torch.float32)
    before = logits(model, given)
    fastrot.apply(model, KEEP)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(logits(compiled, given, use_cache=False), before) < 1e-5


def test_a_forward_that_is_called_by_its_name_rotates():
    """Layers and norms, by whose ends R1 acts online, give the same either way."""
    for name in ("llama-tied", "gemma2", "gpt2"):
        model, given = model_of(name)
        fastrot.apply(model, KEEP)
        calls = []

        def note(module, args, kwargs, output, calls=calls):
            calls.append((module, args, kwargs, output))

        holders = {id(module): module for _, module, r in installed(model) if r.group == "R1"}
        handles = [
            module.register_forward_hook(note, with_kwargs=True) for module in holders.values()
        ]
        logits(model, given, use_cache=False)
        for handle in handles:
            handle.remove()
        assert len(calls) == len(holders) > 0
        with torch.no_grad():
            for module, args, kwargs, output in calls:
                assert torch.equal(module.forward(*args, **kwargs), output)


def test_a_replaced_forward_is_refused_where_the_rotation_lies():
    """Before the rotation and, as the rotation would be lost, behind it."""
    early, given = model_of("gemma2")
    late = copy.deepcopy(early)
    fastrot.apply(late, KEEP)
    for model in (early, late):
        norm = model.model.layers[0].post_attention_layernorm
        norm.forward = lambda x: x
    with pytest.raises(fastrot.RotationError, match=r"post_attention_layernorm .* was replaced"):
        fastrot.apply(early, KEEP, trust=True)
    with pytest.raises(RuntimeError, match=r"forward of this Gemma2RMSNorm was replaced"):
        logits(late, given)


def test_gradient_checkpointing_and_offloading():
    model, given = model_of("llama-tied", torch.float32)
    ids = given["input_ids"]
    fastrot.apply(model, KEEP)
    model(ids, labels=ids).loss.backward()
    before = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert relative_error(model.model.embed_tokens.weight.grad, before) < 1e-5
    expected = logits(model.eval(), given)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(model, given), expected)


def test_what_is_outside_of_the_layers_is_that_of_the_original(tmp_path):
    """Embeddings as input, a resized table, a base model: nothing out there is rotated."""
    model, given = model_of("llama-tied")
    ids = given["input_ids"]
    last = model.model(ids).last_hidden_state.detach()
    twin = copy.deepcopy(model)
    fastrot.apply(model, KEEP)
    assert relative_error(model.model(ids).last_hidden_state.detach(), last) <= 1e-6
    embedded = model(inputs_embeds=twin.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, model(ids).logits)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert relative_error(logits_of(model, ids)[..., :64], logits_of(twin, ids)) <= 1e-6


def test_a_model_without_its_ends_refuses_and_is_restored(tmp_path):
    model, given = model_of("llama-tied", torch.float32)
    fastrot.apply(model, KEEP)
    bare = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(fastrot.RecordError, match="R1"):
        bare(**given)
    fastrot.restore(bare)
    bare.load_state_dict(model.state_dict())
    assert torch.equal(logits(bare, given), logits(model, given))
    del model.model.norm.fastrot_input
    with pytest.raises((RuntimeError, AttributeError), match=r"R1.*model\.norm"):
        model(**given)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe", "llava"])
def test_a_checkpoint_on_disk(name, tmp_path):
    model = build(FAMILIES[name], torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    fastrot.apply(model, KEEP)
    model.save_pretrained(tmp_path / "whole")
    fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", KEEP)
    states = [load_file(tmp_path / f / "model.safetensors") for f in ("whole", "target")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    records = [
        json.loads((tmp_path / f / "config.json").read_text())["fastrot"]
        for f in ("whole", "target")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("tied", [True, False])
def test_drafts_are_copied(tied, tmp_path):
    source = tmp_path / "source"
    tiny("llama", tied=tied, dtype=torch.bfloat16).save_pretrained(source)
    draft = {"mtp.fc.weight": torch.randn(96, 192), "model.layers.2.enorm.weight": torch.randn(96)}
    tensors = load_file(source / "model.safetensors") | draft
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(fastrot.RotationError, match="keep_head=True, --keep-head"):
        fastrot.rotate_checkpoint(source, tmp_path / "target")
    fastrot.rotate_checkpoint(source, tmp_path / "target", KEEP)
    got = load_file(tmp_path / "target" / "model.safetensors")
    read = [*draft, "model.embed_tokens.weight", "model.norm.weight"]
    assert all(torch.equal(got[name], tensors[name]) for name in read)


def test_drafts_are_those_of_the_original():
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this transformers drafts in another way")
    from transformers.cache_utils import MtpCache

    def drafts(model):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            drafting = modeling.MtpModel(model, 1).to(torch.float32).eval()
            perturb(drafting.layers, 0)
            logits = drafting(
                input_ids=ids,
                last_hidden_states=model.model(ids).last_hidden_state,
                attention_mask=None,
                position_ids=torch.arange(ids.shape[1])[None],
                mtp_cache=MtpCache(config=model.config.get_mtp_config()),
            )[1]
        return logits

    model = build(FAMILIES["deepseek_v3"], torch.float32)
    ids = random_ids(model, 1, 12, seed=0)
    before = drafts(model)
    for keep_head, exact in ((True, True), (False, False)):
        rotated = copy.deepcopy(model)
        fastrot.apply(rotated, ("R1", "R4"), keep_head=keep_head)
        assert (relative_error(drafts(rotated), before) < 1e-5) == exact


def test_a_plan_is_json():
    plan = fastrot.plan(tiny("llama"), KEEP)
    assert fastrot.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [str(site).split(" (")[0] for site in plan.online] == ["R1 input", "R1ᵀ input"]


def test_the_command_line(tmp_path, capsys):
    tiny("llama", tied=True).save_pretrained(tmp_path / "source")
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    assert main(["plan", source, "--rotations", "R1", "--keep-head"]) == 0
    table = capsys.readouterr().out
    assert "untied" not in table
    assert "2 online" in table
    assert main(["rotate", source, target, "--keep-head"]) == 0
    assert main(["verify", source, target]) == 0


def test_refusals():
    with pytest.raises(fastrot.RotationError, match=r"keep_head=True is of R1.*among R2, R4"):
        fastrot.Recipe(("R2", "R4"), keep_head=True)
    with pytest.raises(TypeError, match="keep_head must be True or False"):
        fastrot.Recipe(keep_head=1)
    with pytest.raises(fastrot.RotationError, match=r"last norm of OlmoFor.*leave keep_head out"):
        fastrot.plan(build(FAMILIES["olmo"]), "R1", keep_head=True)
    with pytest.raises(fastrot.RotationError, match=r"layerdrop=0\.1 .*config\.layerdrop = 0"):
        fastrot.plan(build(FAMILIES["opt"], layerdrop=0.1), "R1", keep_head=True)
    row = row_of(tiny("llama"))
    mixed = replace(row.mapping, attn_o=("re:.*(embed_tokens|o_proj)$",))
    with pytest.raises(fastrot.RotationError, match=r"inside and outside of model\.layers"):
        fastrot.plan(tiny("llama"), "R1", keep_head=True, mappings=mixed, norm_mappings=row.norms)
    described = {"mappings": row.mapping, "norm_mappings": row.norms[:2]}
    with pytest.raises(fastrot.RotationError, match=r"norm that lm_head reads, .*has none"):
        fastrot.plan(tiny("llama"), "R1", keep_head=True, **described)
