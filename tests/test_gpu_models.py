"""Whole models on a GPU: exact, taken back where something fails, and in CUDA graphs."""

import copy

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from zoo import FAMILIES, build, inputs

import fastrot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROTATIONS = ("R1", "R2", "R3", "R4")
KINDS = [
    *("llama", "qwen3", "gemma3_text", "phi3", "opt", "gpt2", "bloom", "mixtral", "gpt_oss"),
    *("deepseek_v3", "falcon_h1", "cohere2"),
]


@pytest.mark.parametrize("name", [name for name in KINDS if name in FAMILIES])
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
def test_exact(name, kind):
    family = FAMILIES[name]
    for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 2e-5)):
        model = build(family, dtype).cuda()
        given = {key: value.cuda() for key, value in inputs(family, model).items()}
        with torch.no_grad():
            before = model(**given).logits
        state = copy.deepcopy(model.state_dict())
        rotations = list(ROTATIONS)
        for wanted in ROTATIONS:
            try:
                fastrot.plan(model, wanted)
            except fastrot.RotationError:
                rotations.remove(wanted)
        assert rotations
        fastrot.apply(model, rotations, transform_type=kind, seed=3)
        with torch.no_grad():
            after = model(**given).logits
        assert relative_error(after, before) <= limit
        rotated = model.state_dict()
        assert any(not torch.equal(rotated[key], state[key]) for key in state if key in rotated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotations", [("R1",), ("R2",), ("R1", "R2"), ROTATIONS])
def test_weights_are_those_of_the_cpu(dtype, rotations):
    """But for ties: both round the same exact product, the GPU's with errors of float32."""
    on_cpu = tiny("llama", dtype=dtype)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for model in (on_cpu, on_gpu):
        fastrot.apply(model, rotations, transform_type="random-hadamard")
    for (name, a), b in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        differ = (a.float() - b.cpu().float()).abs()
        step = torch.finfo(dtype).eps * a.float().abs().clamp(min=1e-3)
        assert (differ <= 4 * step).all(), name


@pytest.mark.parametrize("undo", ["memory", "disk"])
def test_a_failure_takes_everything_back(undo, monkeypatch):
    model = tiny("llama").cuda()
    before = copy.deepcopy(model.state_dict())
    from fastrot.fuse import fusion

    def fails(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(fusion.Fusion, "run", fails)
    with pytest.raises(RuntimeError, match="injected"):
        fastrot.apply(model, ROTATIONS, undo=undo)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_in_a_static_cache(attention):
    model = tiny("llama").cuda()
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, ROTATIONS, transform_type="random-hadamard", randomize=True)
    model.set_attn_implementation(attention)
    rotated.set_attn_implementation(attention)
    ids = random_ids(model, 2, 12, seed=3).cuda()
    tokens = [
        m.generate(
            ids,
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
        for m in (model, rotated)
    ]
    assert torch.equal(*tokens)


def test_compiled_without_graph_breaks():
    model = tiny("llama").cuda()
    fastrot.apply(model, ROTATIONS)
    ids = random_ids(model, 2, 12, seed=3).cuda()
    want = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            got = compiled(ids).logits.clone()
    assert relative_error(got, want) <= 1e-5
