"""Matrices that SpinQuant's training wrote: read, made orthogonal, used."""

import copy

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny

import fastrot
from fastrot.cli import main
from fastrot.rotations import Rotation


def orthogonal(n, seed):
    return Rotation("random-matrix", n, seed=seed, label="spinquant").operand


def matrices():
    """As training leaves them: in float32, a little off."""
    noise = torch.Generator().manual_seed(0)
    named = {"R1": orthogonal(96, 1)}
    named |= {f"model.layers.{i}.self_attn.R2": orthogonal(16, 2 + i) for i in (1, 0)}
    return {
        name: (q + 1e-4 * torch.randn(q.shape, generator=noise)).float()
        for name, q in named.items()
    }


@pytest.fixture
def path(tmp_path):
    torch.save(matrices(), tmp_path / "R.bin")
    return tmp_path / "R.bin"


def test_read_and_applied(path):
    found = fastrot.read_spinquant(path)
    assert found["R1"].dtype == torch.float64
    torch.testing.assert_close(found["R1"], orthogonal(96, 1), rtol=0, atol=1e-3)
    for layer, q in enumerate(found["R2"]):
        torch.testing.assert_close(q, orthogonal(16, 2 + layer), rtol=0, atol=1e-3)
        assert (q.T @ q - torch.eye(16)).abs().max() < 1e-14
    model = tiny("llama", dtype=torch.float64)
    rotated, ids = copy.deepcopy(model), random_ids(model, 2, 8, seed=0)
    fastrot.apply(rotated, ("R1", "R2"), matrices=found)
    assert relative_error(logits(rotated, ids), logits(model, ids)) <= 1e-6
    gamma = model.model.layers[0].input_layernorm.weight
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    expected = (q_proj * gamma) @ found["R1"]
    torch.testing.assert_close(rotated.model.layers[0].self_attn.q_proj.weight, expected)


def test_on_the_command_line(path, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    tiny("llama").save_pretrained(source)
    assert main(["rotate", str(source), str(target), "--spinquant", str(path)]) == 0
    assert main(["plan", str(source), "--rotations", "R1", "--spinquant", str(path)]) == 0
    assert "matrix 96" in capsys.readouterr().out
    assert main(["plan", str(source), "--rotations", "R4", "--spinquant", str(path)]) == 2
    assert "has matrices for R1 and R2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("model.layers.0.self_attn.R2"), r"layers \[1\]"),
        (lambda m: m.update(R1=torch.ones(96, 96)), "R1 is not orthogonal"),
        (lambda m: m.update(R1=torch.eye(4) * float("nan")), "R1 is not orthogonal"),
        (lambda m: m.update(R1=torch.eye(96)[:5]), r"no square, dense matrix .* but \(5, 96\)"),
        (lambda m: m.update(R1=torch.eye(96).long()), r"but \(96, 96\), int64"),
        (lambda m: m.update(R1=torch.zeros(0, 0)), r"no square, dense matrix .* but \(0, 0\)"),
        (lambda m: m.update(R1=torch.eye(4).to_sparse()), r"but \(4, 4\), float32, sparse_coo"),
        (lambda m: m.update(R1=torch.eye(4).to_sparse_csr()), r"but .* float32, sparse_csr"),
        (lambda m: m.update(R1=torch.eye(4, device="meta")), r"but .* strided, meta"),
        (lambda m: m.update(R1=3), "R1 is no matrix but a int"),
        (lambda m: m.update(R7=torch.eye(4)), "'R7' is neither"),
        (lambda m: m.clear(), "has no matrices"),
    ],
)
def test_refusals(path, change, message):
    named = matrices()
    change(named)
    torch.save(named, path)
    with pytest.raises(fastrot.RotationError, match=message):
        fastrot.read_spinquant(path)


def test_files_that_are_none(path):
    damaged = (
        b"Rx",
        b"\x80\x02.",
        b"\x80\x02]q\x00h\x01.",
        b"(ua.",
        b"cbuiltins\nprint\n.",
        b"J\x00.",
    )
    for content in (b"", b"not of torch", path.read_bytes()[:100], *damaged):
        path.write_bytes(content)
        with pytest.raises(fastrot.RotationError, match="no file of matrices"):
            fastrot.read_spinquant(path)
    torch.save([1], path)
    with pytest.raises(fastrot.RotationError, match="holds a list"):
        fastrot.read_spinquant(path)


def test_damaged_bytes(path):
    """Read after all, or refused; in either format of torch."""
    generator = torch.Generator().manual_seed(0)
    for zipped in (True, False):
        torch.save(matrices(), path, _use_new_zipfile_serialization=zipped)
        whole, refused = path.read_bytes(), 0
        for _ in range(100):
            content = bytearray(whole)
            for at in torch.randint(400, (4,), generator=generator).tolist():
                content[at] = int(torch.randint(256, (), generator=generator))
            path.write_bytes(content)
            try:
                fastrot.read_spinquant(path)
            except fastrot.RotationError as error:
                refused += str(path) in str(error)
        assert refused > 50


def test_a_damaged_file_on_the_command_line(path, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "source")
    path.write_bytes(b"Rx")
    command = ["rotate", str(tmp_path / "source"), str(tmp_path / "target")]
    capsys.readouterr()
    assert main([*command, "--spinquant", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is no file of matrices" in error
    assert "weights_only" not in error  # that would run code from the file
    assert error.count("\n") == 1
