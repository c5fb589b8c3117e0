"""Rotated models on disk: the same logits bit for bit, or a loud refusal."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import logits, random_ids, relative_error, save_rotated, tiny
from safetensors.torch import load_file, save_file
from test_exact import MODEL_TYPES, ROTATIONS
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM

import fastrot
from fastrot.rotations import KINDS

LOAD = "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained({!r}{})"


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_for_bit(model_type, kind, dtype, tmp_path):
    # From disk, as buffers that are not saved come in float32 then, in every dtype.
    model = save_and_load(tiny(model_type, tied=True, dtype=dtype), tmp_path / "original")
    ids = random_ids(model, 2, 12, seed=0)
    fastrot.apply(model, ROTATIONS, transform_type=kind, randomize=True, seed=7)
    once = save_and_load(model, tmp_path / "once")
    twice = save_and_load(once, tmp_path / "twice")
    for loaded in (once, twice):
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert loaded.config.fastrot == model.config.fastrot
    tokens = [
        m.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        for m in (model, once)
    ]
    assert torch.equal(*tokens)


def save_and_load(model, folder, **kwargs):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kwargs).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_can_be_chosen_while_loading(attention, tmp_path):
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    before = logits(model, ids)
    fastrot.apply(model, ROTATIONS)
    loaded = save_and_load(model, tmp_path, attn_implementation=attention)
    assert loaded.config._attn_implementation == attention
    assert relative_error(logits(loaded, ids), before) < 1e-5


def test_what_r3_can_not_do_is_refused_while_loading(tmp_path, monkeypatch):
    model = tiny("llama")
    fastrot.apply(model, "R3")
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(AttentionInterface._global_mapping, "another", print)
    message = r"layers\.0\.self_attn uses .*'another'.* load with attn_implementation='sdpa'"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="another")


def test_attentions_are_those_of_the_original_and_the_model_can_be_saved(tmp_path):
    model = tiny("llama")
    model.set_attn_implementation("eager")
    ids = random_ids(model, 2, 12, seed=0)
    before = model(ids, output_attentions=True).attentions
    fastrot.apply(model, "R3")
    loaded = save_and_load(model, tmp_path, attn_implementation="eager")
    attentions = [m(ids, output_attentions=True).attentions for m in (model, loaded)]
    # The configuration may ask for them, too.
    attentions.append(save_and_load(loaded, tmp_path, output_attentions=True)(ids).attentions)
    for after in attentions:
        assert relative_error(torch.stack(after), torch.stack(before)) < 1e-5


@pytest.mark.slow
def test_without_fastrot_online_rotations_fail_loudly(tmp_path):
    folders = []
    for rotations in (("R3",), ("R4",), ROTATIONS):
        model = tiny("llama")
        fastrot.apply(model, rotations)
        folders.append(str(tmp_path / "-".join(rotations)))
        model.save_pretrained(folders[-1])
    attempts = f"""
import sys
from transformers import AutoModelForCausalLM
def load():
    for folder in {folders!r}:
        for choice in ({{}}, {{"attn_implementation": "sdpa"}}, {{"attn_implementation": "eager"}}):
            try:
                AutoModelForCausalLM.from_pretrained(folder, **choice)
                yield "loaded"
            except ValueError as error:
                yield "refused" if "fastrot" in str(error) else repr(error)
assert set(load()) == {{"refused"}}, set(load())
import fastrot
assert set(load()) == {{"loaded"}}, set(load())
"""
    result = in_a_new_process(attempts)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_fused_checkpoint_is_an_ordinary_one(tmp_path):
    model = tiny("qwen3", tied=True)
    ids = random_ids(model, 2, 12, seed=0)
    fastrot.apply(model, ("R1", "R2"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "experts_implementation"}.intersection(config)
    assert config["tie_word_embeddings"] is False
    torch.save({"ids": ids, "logits": logits(model, ids)}, tmp_path / "expected.pt")
    code = LOAD.format(str(tmp_path), "") + (
        f"; import sys, torch; e = torch.load({str(tmp_path / 'expected.pt')!r})"
        "; assert 'fastrot' not in sys.modules"
        "; assert torch.equal(m(e['ids']).logits, e['logits'])"
    )
    result = in_a_new_process(code)
    assert result.returncode == 0, result.stderr


def test_a_loaded_model_knows_what_was_done(tmp_path):
    model = tiny("llama")
    fastrot.apply(model, ("R1", "R4"))
    loaded = save_and_load(model, tmp_path)
    with pytest.raises(fastrot.AlreadyRotatedError, match="R4 is already on this"):
        fastrot.apply(loaded, "R4")
    fastrot.apply(loaded, "R3")
    again = save_and_load(loaded, tmp_path / "again")
    ids = random_ids(model, 2, 12, seed=0)
    assert torch.equal(logits(again, ids), logits(loaded, ids))


@pytest.mark.slow
def test_remove_after_loading_leaves_an_ordinary_checkpoint(tmp_path):
    model = tiny("llama")
    ids = random_ids(model, 2, 12, seed=0)
    before = logits(model, ids)
    fastrot.apply(model, ROTATIONS, transform_type="random-hadamard")
    loaded = save_and_load(model, tmp_path)
    fastrot.remove(loaded)
    assert relative_error(logits(loaded, ids), before) < 1e-5
    loaded.save_pretrained(tmp_path / "plain")
    assert in_a_new_process(LOAD.format(str(tmp_path / "plain"), "")).returncode == 0


def test_a_newer_format_is_refused(tmp_path):
    model = tiny("llama")
    fastrot.apply(model, "R4")
    model.config.fastrot["format"] = 3
    model.save_pretrained(tmp_path)
    with pytest.raises(fastrot.RecordError, match=r"format 3.*install a newer fastrot"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_format_1_still_loads(kind, tmp_path):
    """Version 0.1.0 wrote neither digest nor checksum."""
    model = tiny("llama")
    fastrot.apply(model, ROTATIONS, transform_type=kind, seed=3)
    ids = random_ids(model, 2, 12, seed=0)
    record = model.config.fastrot
    model.config.fastrot = {"format": 1, "applied": record["applied"]}
    loaded = save_and_load(model, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    fastrot.remove(loaded, "R3")
    assert loaded.config.fastrot["format"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_loading_in_another_dtype(kind, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    ids = random_ids(model, 2, 12, seed=0)
    before = logits(model, ids)
    fastrot.apply(model, ROTATIONS, transform_type=kind)
    model.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert relative_error(logits(wide, ids), before) < 1e-5
    assert relative_error(logits(narrow, ids), before) < 3e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_of_a_rotated_checkpoint(kind, tmp_path):
    """Its modules have other names; rotations and their removal must not depend on them."""
    model = tiny("llama", dtype=torch.float64)
    ids = random_ids(model, 2, 12, seed=0)
    before = model.model(ids).last_hidden_state
    fastrot.apply(model, ("R2", "R3", "R4"), transform_type=kind, randomize=True)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert relative_error(base(ids).last_hidden_state, before) < 1e-6
    fastrot.remove(base)
    assert relative_error(base(ids).last_hidden_state, before) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_without_its_rotations_is_refused(kind, tmp_path):
    model = tiny("llama")
    plain = copy.deepcopy(model)
    fastrot.apply(model, "R4", transform_type=kind)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fastrot_down_proj_input\.operand"):
        plain.load_state_dict(model.state_dict())
    bare = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(RuntimeError, match=r"fastrot_down_proj_input\.operand"):
        bare.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="not installed there; load the checkpoint"):
        fastrot.remove(bare)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "fastrot" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, model\..*fastrot_down_proj_input"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_seed_that_was_edited_is_noticed(tmp_path):
    model = tiny("llama")
    fastrot.apply(model, "R4", transform_type="random-hadamard", seed=1)
    applied = copy.deepcopy(model.config.fastrot["applied"])
    applied[0]["seed"] = 2
    for record in ({"format": 1, "applied": applied}, model.config.fastrot | {"applied": applied}):
        model.config.fastrot = record
        with pytest.raises(fastrot.RecordError, match=r"recorded seed 2 makes|have the checksum"):
            save_and_load(model, tmp_path)


def drop_a_rotation(applied):
    del applied[0]["transform_config"]["config_groups"]["R4"]


def flip_inverse(applied):
    applied[0]["transform_config"]["config_groups"]["R4"]["apply"][0]["inverse"] = True


def another_block(applied):
    applied[0]["transform_config"]["config_groups"]["R4"]["head_dim"] = 28


def one_side_of_r3(applied):
    del applied[0]["transform_config"]["config_groups"]["R3"]["apply"][0]


def nothing_applied(applied):
    applied.clear()


EDITS = [drop_a_rotation, flip_inverse, another_block, one_side_of_r3, nothing_applied]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_record_is_refused(edit, kind, tmp_path):
    model = tiny("llama")
    fastrot.apply(model, ROTATIONS, transform_type=kind)
    edit(model.config.fastrot["applied"])
    model.save_pretrained(tmp_path)
    with pytest.raises(fastrot.RecordError, match="was edited or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_lost_record_is_refused(tmp_path):
    model = tiny("llama")
    fastrot.apply(model, "R4")
    model.config.fastrot = None
    model.save_pretrained(tmp_path)
    with pytest.raises(fastrot.RecordError, match="names none"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_new_weights_under_the_configuration_of_a_rotated_model():
    model = tiny("llama", dtype=torch.float64)
    fastrot.apply(model, ("R1", "R2"))
    other = type(model)(model.config).double().eval()
    with pytest.raises(fastrot.AlreadyRotatedError, match=r"del config\.fastrot"):
        fastrot.apply(other, ("R1", "R2"))
    config = copy.deepcopy(model.config)
    del config.fastrot
    other = type(model)(config).double().eval()
    fastrot.apply(other, ("R1", "R2"))
    assert other.config.fastrot == model.config.fastrot


R4 = "model.layers.0.mlp.fastrot_down_proj_input.operand"


def flip_a_sign(tensors):
    tensors[R4][3] *= -1


def exchange_two(tensors):
    other = R4.replace("0", "1")
    tensors[R4], tensors[other] = tensors[other], tensors[R4]


def one_more(tensors):
    tensors[R4.replace("down", "up")] = tensors[R4].clone()


def one_weight_less(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip_a_sign, r"operand of R4, model\.layers\.0\.mlp\.fastrot_down_proj_input"),
        (exchange_two, "recorded seed|are not those"),
        (one_more, r"fastrot_up_proj_input\.operand"),
        (one_weight_less, r"lacks weights, model\.layers\.0\.mlp\.up_proj\.weight"),
    ],
)
@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
def test_edited_weights_are_refused(edit, message, kind, tmp_path):
    model = tiny("llama")
    fastrot.apply(model, ROTATIONS, transform_type=kind, randomize=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastrot.RecordError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_that_lost_its_record_is_not_loaded(tmp_path):
    """A tool may write the configuration of the original beside rotated weights."""
    save_rotated(tmp_path)
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(fastrot.RecordError, match=r"fastrot_down_proj_input.*no record of them"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(fastrot.RecordError, match="no record of them"):
        AutoModel.from_pretrained(tmp_path)


def test_a_model_s_own_configuration_may_be_given(tmp_path):
    model = tiny("llama")
    ids = random_ids(model, 2, 8, seed=0)
    fastrot.apply(model, ROTATIONS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=loaded.config)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(logits(again, ids), logits(model, ids))
