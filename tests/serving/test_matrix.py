"""Each way to rotate, in each server and each kind of numbers, beside what is not rotated there."""

import pytest
from cells import NUMBERS, RECIPES, SERVERS, measured, stored
from engine import assert_same, distance

SOME = {("vLLM", "float32", "R2 online"), ("vLLM", "W4A16", "R1-R4")}
CELLS = [
    pytest.param(*cell, marks=() if cell in SOME else pytest.mark.exhaustive, id="-".join(cell))
    for cell in ((s, n, r) for s in SERVERS for n in NUMBERS for r in RECIPES)
]


@pytest.fixture(scope="module")
def unrotated(tmp_path_factory):
    """The answers of the unrotated checkpoint, and what it would say without rounding."""
    known = {}

    def answers_of(server, numbers):
        if (server, numbers) not in known:
            folder, exact = stored(tmp_path_factory.mktemp("plain"), "llama", None, numbers)
            got = measured(server, folder, numbers)[0]
            if exact is None:
                exact = got.scores if numbers == "float32" else answers_of(server, "float32")[1]
            known[server, numbers] = got, exact
        return known[server, numbers]

    return answers_of


@pytest.mark.parametrize(("server", "numbers", "rotations"), CELLS)
def test_a_cell(server, numbers, rotations, unrotated, tmp_path):
    plain, exact = unrotated(server, numbers)
    folder, rotated_exact = stored(tmp_path, "llama", RECIPES[rotations], numbers)
    got, without = measured(server, folder, numbers)
    # Other weights were rounded to 4 bits.
    expected = exact if rotated_exact is None else rotated_exact
    assert without
    if numbers == "float32":
        assert_same(got, plain)
    limit = 2e-5 if numbers == "float32" else 2 * distance(plain, exact)
    assert distance(got, expected) < limit
    for answers in without.values():
        assert distance(answers, expected) > 3 * limit
