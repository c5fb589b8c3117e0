"""``Rotation``: orthogonal, seeded, the same by every way of applying it."""

import pytest
import torch

from fastrot import HadamardSizeError, Rotation
from fastrot.rotations import KINDS

SHAPES = [(64, None), (96, None), (96, 12), (28, None), (60, 20), (1, None)]


@pytest.mark.parametrize(("size", "block"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixes_ones", [False, True])
def test_orthogonal_and_consistent(kind, size, block, fixes_ones):
    rotation = Rotation(kind, size, block, seed=3, label="R1", fixes_ones=fixes_ones)
    matrix = rotation.matrix()
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-13)
    x = torch.randn(5, size, dtype=torch.float64)
    for inverse in (False, True):
        dense = matrix.T if inverse else matrix
        torch.testing.assert_close(rotation.apply(x, inverse=inverse), x @ dense)
        torch.testing.assert_close(rotation.apply(x.T, 0, inverse=inverse), (x @ dense).T)
    torch.testing.assert_close(rotation.apply(rotation.apply(x), inverse=True), x)


@pytest.mark.parametrize(("size", "block"), [(64, None), (96, 12), (28, None), (768, None)])
@pytest.mark.parametrize("kind", KINDS)
def test_fixes_ones_and_spreads_the_rest(kind, size, block):
    """It commutes with centring, and one outlier goes everywhere: entries like Gaussian noise."""
    matrix = Rotation(kind, size, block, fixes_ones=True).matrix()
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(ones @ matrix, ones)
    torch.testing.assert_close(matrix @ ones, ones)
    plain = Rotation(kind, size, block).matrix()
    assert (ones @ plain - ones).norm() > 1, "the plain rotation must not pass"
    order = block or size
    assert matrix.abs().max() < 6 * order**-0.5


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
def test_rotations_that_fix_the_ones_depend_on_the_seed(kind):
    first, second = (Rotation(kind, 32, seed=s, fixes_ones=True).matrix() for s in (0, 1))
    assert not torch.equal(first, second)


def test_blocks_are_equal():
    matrix = Rotation("random-matrix", 30, 10).matrix()
    first = matrix[:10, :10]
    assert torch.equal(matrix, torch.block_diag(first, first, first))


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
def test_seed_and_label_choose_the_rotation(kind):
    def matrix(seed, label):
        return Rotation(kind, 16, seed=seed, label=label).matrix()

    assert torch.equal(matrix(1, "R2"), matrix(1, "R2"))
    assert not torch.equal(matrix(1, "R2"), matrix(2, "R2"))
    assert not torch.equal(matrix(1, "R2"), matrix(1, "R2.model.layers.0"))


def test_signs_are_a_promise():
    """A seed means these signs in every version."""
    signs = Rotation("random-hadamard", 16, seed=0, label="R1").operand
    assert "".join("+" if s > 0 else "-" for s in signs) == "+--+++-+++-----+"


def test_random_matrices_are_haar():
    """Traces of Haar orthogonal matrices have mean 0 and variance 1 (Diaconis & Shahshahani)."""
    traces = torch.tensor(
        [float(Rotation("random-matrix", 20, seed=s).matrix().trace()) for s in range(400)]
    )
    assert abs(float(traces.mean())) < 4 / 20
    assert 0.7 < float(traces.var()) < 1.4


def test_uniform_noise_would_not_pass():
    """Negative control of the orthogonality check: the field's random matrices are uniform."""
    noise = torch.rand(64, 64, dtype=torch.float64) / 8
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            noise @ noise.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-13
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("hadamrd", 64), ValueError, "'hadamrd' is not one of hadamard, random-hadamard"),
        (("hadamard", 27392), HadamardSizeError, "27392"),
        (("hadamard", 64, 24), ValueError, "block_size=24 does not divide 64"),
        (("hadamard", 576, 128), ValueError, "divide 576; 72, 96, 144, 192 would work"),
        (("hadamard", 0), ValueError, "size 0 is not positive"),
        (("hadamard", 64, -8), ValueError, "block_size=-8 does not divide 64"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        Rotation(*arguments)


def test_wrong_dimension_is_refused():
    with pytest.raises(ValueError, match=r"size 64 cannot act on dimension -1 of \(2, 32\)"):
        Rotation("hadamard", 64).apply(torch.ones(2, 32))


def test_str():
    assert str(Rotation("hadamard", 64)) == "hadamard 64"
    assert str(Rotation("random-hadamard", 64, 16)) == "random-hadamard 4x16"
