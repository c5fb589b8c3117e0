"""Headers of checkpoints, and the way of every tensor into a model, against real loads."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_rotate import PERMUTED
from zoo import FAMILIES, build

import fastrot
from fastrot.checkpoint.header import CheckpointError, header_of, read_header, read_headers
from fastrot.checkpoint.trace import trace
from fastrot.checkpoint.traced import Traced, UntraceableError
from fastrot.integrations.outlines import model_of

TENSORS = {
    "a": torch.randn(3, 5, dtype=torch.bfloat16),
    "b.é": torch.arange(7),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
}


def place(piece):
    """The index of every element of a piece in its source."""
    grid = torch.meshgrid(*(torch.arange(n) for n in piece.shape or (1,)), indexing="ij")
    for axis in piece.axes:
        assert not axis.mixed
        yield sum(
            (grid[dim] * stride for dim, stride in axis.strides),
            torch.full(piece.shape, axis.start),
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_made_of_what_was_saved(name, tmp_path):
    model = build(FAMILIES[name], torch.float32)
    model.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    try:
        shapes = model_of(model.config)
    except ValueError:
        with torch.device("meta"):
            shapes = type(model)(model.config)
    if name in PERMUTED:
        with pytest.raises(fastrot.RotationError, match="can't be done to a file"):
            trace(shapes, read_headers(files)[0])
        return
    made = trace(shapes, read_headers(files)[0])
    state = model.state_dict()
    assert not made.unknown
    assert set(made.missing) <= set(shapes.all_tied_weights_keys)
    assert set(made.targets) | set(made.missing) >= set(dict(model.named_parameters()))
    for parameter, target in made.targets.items():
        got = torch.full(target.shape, torch.nan, dtype=torch.float64)
        for piece in target.pieces:
            box = tuple(slice(*ends) for ends in piece.box)
            if any(axis.mixed for axis in piece.axes):  # where from is not followed, only of what
                got[box] = state[parameter][box].double()
                assert torch.isin(got[box], saved[piece.source].double()).all(), parameter
                continue
            got[box] = saved[piece.source][tuple(place(piece))].double()
        assert torch.equal(got, state[parameter].double()), parameter


def test_rearrangements_are_followed():
    """Random chains of what conversions do, against the same on numbers."""
    generator = torch.Generator().manual_seed(0)

    def pick(count):
        return int(torch.randint(count, (), generator=generator))

    def chain(x):
        for _ in range(4):
            dim = pick(x.dim())
            match pick(6):
                case 0:
                    x = x.transpose(dim, pick(x.dim()))
                case 1 if x.shape[dim] % 2 == 0:
                    x = torch.cat(x.chunk(2, dim)[::-1], dim)
                case 2 if x.shape[dim] % 2 == 0:
                    x = x.unflatten(dim, (2, -1))
                case 3 if x.dim() > 2:
                    x = x.flatten(0, 1)
                case 4:
                    x = torch.stack([x, x], dim)[..., :] if x.dim() < 4 else x
                case 5 if x.shape[dim] > 2:
                    x = x.narrow(dim, 1, x.shape[dim] - 1)
        return x

    followed = mixed = 0
    for seed in range(300):
        generator.manual_seed(seed)
        expected = chain(torch.arange(96).view(8, 12))
        generator.manual_seed(seed)
        try:
            traced = chain(Traced.of("x", (8, 12), torch.float32))
        except UntraceableError:
            continue
        assert traced.shape == expected.shape
        for piece in traced.pieces:
            there = expected[tuple(slice(*ends) for ends in piece.box)]
            if any(axis.mixed for axis in piece.axes):
                mixed += 1
                continue
            rows, columns = place(piece)
            assert torch.equal(rows * 12 + columns, there)
            followed += 1
    assert followed > 300
    assert mixed > 0


def test_arithmetic_is_refused():
    with pytest.raises(UntraceableError, match="mul"):
        Traced.of("x", (2,), torch.float32) * 2


def test_headers_agree_with_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    entries, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    head, starts = header_of(entries, metadata)
    assert len(head) % 64 == 0
    raw = (tmp_path / "x.safetensors").read_bytes()
    size = max(starts[name] + entry.nbytes for name, entry in entries.items())
    body = bytearray(head.ljust(size, b"\0"))
    for name, entry in entries.items():
        body[starts[name] : starts[name] + entry.nbytes] = raw[entry.offset :][: entry.nbytes]
    (tmp_path / "y.safetensors").write_bytes(body)
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in TENSORS.items())


def damaged(raw):
    """Files that are not what they should be: each one different."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])

    def with_header(**changes):
        new = json.dumps(header | changes).encode()
        return len(new).to_bytes(8, "little") + new + raw[8 + length :]

    yield from (raw[:end] for end in (0, 5, 8, 40, len(raw) - 1))
    yield raw + b"\0"
    yield (1 << 60).to_bytes(8, "little") + raw[8:]
    yield raw[:8] + b"[" + raw[9:]
    for change in (
        {"dtype": "F31"},
        {"shape": [3, 6]},
        {"shape": [-3, -5]},
        {"shape": "35"},
        {"shape": [[3], 5]},
        {"data_offsets": [0, 29]},
        {"data_offsets": [1, 31]},
        {"data_offsets": [0]},
        {"data_offsets": None},
    ):
        yield with_header(a=header["a"] | change)
    yield with_header(a=None)
    yield with_header(more=header["a"])


def test_damaged_headers_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": TENSORS["a"]}, file)
    count = 0
    for number, raw in enumerate(damaged(file.read_bytes())):
        broken = tmp_path / f"{number}.safetensors"
        broken.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"cut short|damaged"):
            read_header(broken)
        count += 1
    assert count > 15


def test_flipped_bits_of_a_header_are_refused_or_harmless(tmp_path):
    file, broken = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": TENSORS["a"]}, file)
    raw = file.read_bytes()
    for at, bit in itertools.product(range(len(raw) - 30), range(8)):
        broken.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        try:
            entries, _ = read_header(broken)
        except CheckpointError:
            continue
        assert sum(entry.nbytes for entry in entries.values()) == 30


def test_one_name_in_two_files_is_refused(tmp_path):
    for name in "xy":
        save_file({"a": TENSORS["a"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="a lies in"):
        read_headers(tmp_path.glob("*.safetensors"))


def test_a_dtype_that_is_not_known_is_no_damage(tmp_path):
    raw = json.dumps({"codes": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(2))
    with pytest.raises(CheckpointError, match=r"codes in .* is of dtype 'F4', which"):
        read_header(tmp_path / "x")
