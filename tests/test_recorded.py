"""What a server reads of a rotated checkpoint before it builds a layer."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file
from zoo import FAMILIES, build

import fastrot
from fastrot.edits import OnlineSite
from fastrot.integrations.vllm.operands import INDEX, SINGLE, with_matrices
from fastrot.integrations.vllm.recorded import check_ranks, on_rank, recorded_sites, split_sites
from fastrot.integrations.vllm.start import check_start
from fastrot.record import has_online
from fastrot.rotations import Rotation

ALL = ("R1", "R2", "R3", "R4")


def rotated(folder=None, **options):
    model = tiny("llama")
    handle = fastrot.apply(model, **options)
    if folder is not None:
        model.save_pretrained(folder)
    return model, handle


def down(size, block=None, group="R4"):
    rotation = Rotation("hadamard", size, block)
    return OnlineSite("model.layers.0.mlp.down_proj", "input", rotation, False, group)


def test_the_sites_of_a_configuration_are_those_of_the_plan():
    plan = fastrot.plan(tiny("llama"), ALL, transform_type="random-hadamard", seed=3)
    model, _ = rotated(rotations=ALL, transform_type="random-hadamard", seed=3)
    assert recorded_sites(model.config) == list(plan.online)
    assert model.config.quantization_config is not None  # it works on a copy


def test_experts_are_called_what_the_checkpoint_calls_them(tmp_path):
    model = build(FAMILIES["mixtral"], torch.float32)
    fastrot.apply(model, ("R4",), transform_type="random-matrix")
    model.save_pretrained(tmp_path)
    sites = with_matrices(recorded_sites(model.config), str(tmp_path))
    assert [site.module for site in sites] == [
        f"model.layers.{n}.block_sparse_moe.experts" for n in (0, 1)
    ]
    assert sites[0].rotation.known


def test_whether_there_is_anything_online():
    assert has_online(rotated(rotations=ALL)[0].config)
    assert not has_online(rotated(rotations=("R1", "R2"))[0].config)
    assert not has_online(tiny("llama").config)


def test_ranks_of_whole_blocks_are_served():
    check_ranks([down(112, 28)], 4)
    part = on_rank(down(112, 28), 56)
    assert (part.rotation.size, part.rotation.block) == (56, 28)


def test_a_rank_with_a_part_of_a_block_is_refused():
    with pytest.raises(fastrot.RotationError) as error:
        check_ranks([down(112)], 2)
    for words in ("R4 of model.layers.0.mlp.down_proj", "blocks of 112", "the 56 of its 112"):
        assert words in str(error.value)
    assert "n one of 2, 4, 8, 28, 56, or" in str(error.value)


def test_only_inputs_of_linear_layers_and_experts_are_split():
    """Heads are whole on every rank, and so is the stream at norms and decoder layers."""
    model = build(FAMILIES["mixtral"], torch.float32)
    fastrot.apply(model, ALL, keep_head=True)
    assert {(site.group, site.location) for site in recorded_sites(model.config)} == {
        ("R1", "input"),
        ("R3", "q_attn"),
        ("R3", "k_cache"),
        ("R4", "down_input"),
    }
    assert [site.module for site in split_sites(model.config)] == [
        f"model.layers.{n}.block_sparse_moe.experts" for n in (0, 1)
    ]
    model = tiny("llama")
    fastrot.apply(model, ALL, keep_head=True)
    assert [site.module for site in split_sites(model.config)] == [
        f"model.layers.{n}.mlp.down_proj" for n in (0, 1)
    ]


def test_what_a_server_may_start():
    def start(config, quantization, ranks=1):
        server = SimpleNamespace(model="m", hf_config=config, quantization=quantization)
        check_start(server, SimpleNamespace(tensor_parallel_size=ranks))

    config = rotated(rotations=("R4",))[0].config
    start(config, "fastrot")
    with pytest.raises(fastrot.RotationError, match="which do not divide the 56 of its 112"):
        start(config, "fastrot", ranks=2)
    for quantization in ("gptq", None):
        with pytest.raises(fastrot.RotationError, match=f"quantization is {quantization!r}"):
            start(config, quantization)
    start(rotated(rotations=("R1", "R2"))[0].config, "gptq", ranks=2)
    start(rotated(rotations=("R1", "R3"), keep_head=True)[0].config, "fastrot", ranks=2)


def test_dense_matrices_are_those_of_the_checkpoint(tmp_path):
    model, _ = rotated(tmp_path, rotations=("R3", "R4"), transform_type="random-matrix")
    sites = with_matrices(recorded_sites(model.config), str(tmp_path))
    made = fastrot.plan(tiny("llama"), ("R3", "R4"), transform_type="random-matrix").online
    assert [(s.module, s.location, s.rotation.size) for s in sites] == [
        (s.module, s.location, s.rotation.size) for s in made
    ]
    for site, other in zip(sites, made, strict=True):
        torch.testing.assert_close(site.rotation.operand, other.rotation.operand)
    assert len({id(site.rotation.operand) for site in sites}) == 2


def test_a_matrix_that_is_not_the_recorded_one(tmp_path):
    q = Rotation("random-matrix", 112).matrix()
    model, _ = rotated(tmp_path, rotations=("R4",), matrices={"R4": q})
    sites = recorded_sites(model.config)
    assert torch.equal(with_matrices(sites, str(tmp_path))[1].rotation.operand, q)
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.fastrot_down_proj_input.operand"
    other = Rotation("random-matrix", 112, seed=1).matrix().view(torch.int64)
    save_file(tensors | {name: other}, tmp_path / SINGLE)
    with pytest.raises(fastrot.RecordError, match=f"{name} is not the matrix"):
        with_matrices(sites, str(tmp_path))
    save_file(tensors | {name: other[:3]}, tmp_path / SINGLE)
    with pytest.raises(fastrot.RecordError, match=r"torch.int64 \(3, 112\)"):
        with_matrices(sites, str(tmp_path))
    del tensors[name]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(fastrot.RecordError, match=f"has no {name}"):
        with_matrices(sites, str(tmp_path))


def test_a_checkpoint_in_several_files(tmp_path):
    model, _ = rotated(rotations=("R4",), transform_type="random-matrix")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())) > 1
    assert with_matrices(recorded_sites(model.config), str(tmp_path))


def test_dense_matrices_need_a_folder():
    model, _ = rotated(rotations=("R4",), transform_type="random-matrix")
    with pytest.raises(fastrot.RotationError, match="download the checkpoint"):
        with_matrices(recorded_sites(model.config), "owner/name")
    model, _ = rotated(rotations=("R4",))
    assert len(with_matrices(recorded_sites(model.config), "owner/name")) == 2
