"""The stages of a rotation: one loop, whatever their order, against dense float64 matrices."""

import itertools

import pytest
import torch

from fastrot import Rotation
from fastrot.kernels.weight import Side
from fastrot.rotations.stages import Hadamard, Matrix, Signs, dense, inverted, merged, multiply

ORDER, BLOCKS = 12, 3
SIGNS = [Rotation("random-hadamard", ORDER, seed=seed).operand for seed in (0, 1)]
STAGES = (
    Signs(SIGNS[0]),
    Signs(SIGNS[1]),
    Hadamard(ORDER),
    Hadamard(ORDER, transpose=True),
    Matrix(Rotation("random-matrix", ORDER).matrix()),
)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_any_product_in_any_order(length):
    x = torch.randn(5, ORDER * BLOCKS, dtype=torch.float64)
    for stages in itertools.product(STAGES, repeat=length):
        q = torch.block_diag(*[dense(stages)] * BLOCKS)
        torch.testing.assert_close(multiply(x, stages), x @ q)
        torch.testing.assert_close(multiply(x, inverted(stages)), x @ q.T)
        torch.testing.assert_close(multiply(x.T, stages, 0), (x @ q).T)


def test_the_dense_product_has_its_factors_in_order():
    """The oracle of the test above, against matrices written down by hand."""
    first, second = (torch.diag(signs.double()) for signs in SIGNS)
    h = Rotation("hadamard", ORDER).matrix()
    q = dense((Signs(SIGNS[0]), Hadamard(ORDER), Signs(SIGNS[1])))
    assert torch.equal(q, first @ h @ second)
    assert not torch.equal(q, second @ h @ first)


def test_signs_cost_nothing_beside_a_hadamard_matrix():
    forth, back = Hadamard(ORDER), Hadamard(ORDER, transpose=True)
    first, second = STAGES[:2]
    assert merged((first, forth)) == [Side(ORDER, SIGNS[0])]
    assert merged((back, first)) == [Side(ORDER, SIGNS[0], True)]
    assert merged((forth, first)) == [Side(ORDER), first]
    assert merged((first, back)) == [first, Side(ORDER, None, True)]
    assert merged((back, first, second, forth)) == [
        Side(ORDER, SIGNS[0], True),
        Side(ORDER, SIGNS[1]),
    ]
    assert merged(("γ", first, forth)) == ["γ", Side(ORDER, SIGNS[0])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    x = torch.randn(64, ORDER, dtype=dtype)
    stages = (*STAGES[:1], *STAGES[2:4], STAGES[4], *STAGES[1:3])
    right = (x.double() @ dense(stages)).to(dtype)
    error = (multiply(x, stages).double() - x.double() @ dense(stages)).norm()
    assert error <= 1.01 * (right.double() - x.double() @ dense(stages)).norm()
