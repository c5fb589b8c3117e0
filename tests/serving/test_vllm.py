"""vLLM serves what fastrot rotated: the oracle is the unrotated checkpoint in the same server."""

import pytest
from engine import answers, assert_same, checkpoint, engine, rotations, served, without

ALL = ("R1", "R2", "R3", "R4")
RECIPES = {
    "llama": {
        "rotations": ("R3", "R4"),
        "transform_type": "random-hadamard",
        "block_size": {"R4": 56},
    },
    "qwen3": {"rotations": ALL},
    "qwen2": {"rotations": ALL, "randomize": True, "seed": 3},
    "mistral": {"rotations": ALL, "transform_type": "random-matrix"},
}
PLACES = {"fastrot_input": 2, "fastrot_q_attn": 2, "fastrot_k_cache": 2}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """What the unrotated checkpoint of a family answers; each is served once."""
    known = {}

    def answers_of(family):
        if family not in known:
            known[family] = served(checkpoint(tmp_path_factory.mktemp(family), family))
        return known[family]

    return answers_of


@pytest.mark.parametrize("family", RECIPES)
def test_the_same_tokens_and_log_probabilities(family, plain, tmp_path):
    folder = checkpoint(tmp_path, family, RECIPES[family])
    with engine(folder) as llm:
        assert llm.apply_model(rotations) == [PLACES]
        assert_same(answers(llm), plain(family))
        for place in PLACES:
            assert without(llm, place).tokens != plain(family).tokens
        assert_same(answers(llm), plain(family))
