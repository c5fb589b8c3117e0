"""R1 online in vLLM: behind post-norms, and at the ends of the stream with `keep_head`."""

import pytest
from checkpoints import POST_NORMS, checkpoint
from engine import answers, assert_same, engine, rotations, served, without

KEPT = {"rotations": ("R1",), "keep_head": True, "transform_type": "random-hadamard"}
RECIPES = {
    "gemma2": {"rotations": ("R1", "R2", "R3", "R4"), "keep_head": True},
    "gemma3_text": {"rotations": ("R1", "R2", "R3", "R4"), "transform_type": "random-hadamard"},
    # Of transformers in vLLM, which has no such model of its own.
    "olmo2": {"rotations": ("R1", "R2", "R3", "R4"), "transform_type": "random-matrix"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the unrotated checkpoint of a family answers; each is served once."""
    known = {}

    def answers_of(family):
        if family not in known:
            known[family] = served(checkpoint(tmp_path_factory.mktemp(family), family))
        return known[family]

    return answers_of


@pytest.mark.parametrize("family", POST_NORMS)
def test_behind_post_norms(family, plain, tmp_path):
    with engine(checkpoint(tmp_path, family, RECIPES[family])) as llm:
        [places] = llm.apply_model(rotations)
        assert places["fastrot_output"] == 4
        assert_same(answers(llm), plain(family))
        for layer in ("0.post_attention_layernorm", "1.post_feedforward_layernorm"):
            assert without(llm, "fastrot_output", layer).tokens != plain(family).tokens


@pytest.mark.parametrize("impl", ["vllm", "transformers"])
def test_the_head_is_kept(impl, plain, tmp_path):
    with engine(checkpoint(tmp_path, "llama", KEPT), model_impl=impl) as llm:
        assert llm.apply_model(rotations) == [{"fastrot_input": 2}]
        assert_same(answers(llm), plain("llama"))
        for end in ("layers.0", "model.norm"):
            assert without(llm, "fastrot_input", end).tokens != plain("llama").tokens


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_compiled(family, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder = checkpoint(tmp_path, family, RECIPES[family] | {"keep_head": True})
    assert_same(served(folder, enforce_eager=False), plain(family))


def test_tensor_parallelism(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    recipe = RECIPES["gemma3_text"] | {"keep_head": True, "block_size": {"R4": 56}}
    folder = checkpoint(tmp_path, "gemma3_text", recipe)
    assert_same(served(folder, tensor_parallel_size=2), plain("gemma3_text"))
