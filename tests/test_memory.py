"""Weights on memory that is not theirs alone: right, or refused by name with nothing written."""

import mmap

import numpy as np
import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from torch.overrides import TorchFunctionMode, has_torch_function

import fastrot
from fastrot.memory import on_cpu

UP = "model.layers.0.mlp.up_proj.weight"
ROTATIONS = ("R1", "R2", "R3", "R4")


def placed(tensor):
    """A model of which one weight holds its values on the memory that ``tensor`` makes of them."""
    model = tiny("llama")
    weight = model.get_parameter(UP)
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    weight.data = tensor(weight.detach().numpy().copy())
    return model, ids, expected


def saved(path, values):
    np.save(path, values)
    return path


def on_pages(values, *flags):
    pages = mmap.mmap(-1, values.nbytes, *flags)
    pages.write(values.tobytes())
    return torch.frombuffer(pages, dtype=torch.float32).view(values.shape)


SHARED = {
    "memmap r": lambda v, p: np.load(saved(p / "a.npy", v), mmap_mode="r"),
    "memmap r+": lambda v, p: np.load(saved(p / "a.npy", v), mmap_mode="r+"),
    "share_memory": lambda v, p: torch.from_numpy(v).share_memory_(),
    "from_file": lambda v, p: torch.from_file(
        str(v.tofile(p / "a") or p / "a"), shared=True, size=v.size
    ).view(v.shape),
    "anonymous": lambda v, p: on_pages(v, mmap.MAP_SHARED),
}


def as_tensor(made):
    return made if isinstance(made, torch.Tensor) else torch.from_numpy(made)


@pytest.mark.filterwarnings("ignore:The given")
@pytest.mark.parametrize("kind", SHARED)
def test_shared_or_read_only_mappings_are_refused(kind, tmp_path):
    model, ids, expected = placed(lambda v: as_tensor(SHARED[kind](v, tmp_path)))
    before = fingerprint(model)
    for action in (fastrot.plan, fastrot.apply):
        with pytest.raises(fastrot.RotationError, match=rf"{UP} lies on .*\.clone\(\)"):
            action(model, ROTATIONS)
    assert difference(before, fingerprint(model)) == []
    weight = model.get_parameter(UP)
    weight.data = weight.data.clone()  # what the message advises
    fastrot.apply(model, ROTATIONS)
    assert relative_error(logits(model, ids), expected) <= 1e-5


@pytest.mark.parametrize("undo", ["none", "memory"])
@pytest.mark.parametrize("kind", ["array", "read-only array", "bytes", "private mapping"])
@pytest.mark.filterwarnings("ignore:The given")
def test_memory_of_others_is_left_as_it_is(kind, undo, tmp_path):
    """The weight moves to memory of its own; what lay under it has not changed."""
    kept = []

    def place(values):
        if kind == "bytes":
            kept.append(values.tobytes())
            return torch.frombuffer(kept[0], dtype=torch.float32).view(values.shape)
        if kind == "private mapping":
            values = np.load(saved(tmp_path / "a.npy", values), mmap_mode="c")
        values.setflags(write=kind != "read-only array")
        kept.append(values)
        return torch.from_numpy(values)

    model, ids, expected = placed(place)
    weight = model.get_parameter(UP)
    values = weight.detach().clone()
    fastrot.apply(model, ROTATIONS, undo=undo)
    assert relative_error(logits(model, ids), expected) <= 1e-5
    under = np.frombuffer(kept[0], np.float32).reshape(values.shape)
    assert torch.equal(torch.from_numpy(under.copy()), values)
    assert model.get_parameter(UP) is weight
    fastrot.remove(model)
    assert relative_error(logits(model, ids), expected) <= 1e-5


def test_a_loaded_checkpoint_leaves_its_file_alone(tmp_path):
    """from_pretrained maps the file: rotating must not change what is on disk."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    loaded = type(model).from_pretrained(tmp_path)
    ids = random_ids(model, 2, 8, seed=0)
    expected = logits(model, ids)
    fastrot.apply(loaded, ROTATIONS)
    assert relative_error(logits(loaded, ids), expected) <= 1e-5
    assert file.read_bytes() == content


def test_nothing_is_lost_where_everything_moved(monkeypatch):
    """An error in the middle is taken back without copies if no weight was written in place."""
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.data = torch.from_numpy(parameter.detach().numpy().copy())
    before = fingerprint(model)
    from fastrot.kernels.cpu_weight import MatrixRotation

    def fail(*args):
        raise MemoryError("injected")

    monkeypatch.setattr(MatrixRotation, "run", fail)
    with pytest.raises(MemoryError):
        fastrot.apply(model, ROTATIONS)
    assert difference(before, fingerprint(model)) == []


class ZerosElsewhere(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        away = {"device": "meta"} if function is torch.zeros else {}
        return function(*args, **{**away, **(kwargs or {})})


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), ZerosElsewhere])
def test_new_tensors_lie_on_the_cpu(around):
    with around():
        assert torch.zeros(2).is_meta
        with on_cpu():
            assert not torch.zeros(2).is_meta
            assert not torch.empty(2).is_meta
        assert torch.zeros(2).is_meta


def test_a_default_device_does_not_matter():
    torch.set_default_device("meta")
    try:
        with on_cpu():
            assert not torch.zeros(2).is_meta
    finally:
        torch.set_default_device(None)


def test_torch_stays_as_quick_as_it_is():
    """A mode would send every call, and every attribute of a tensor, through Python."""
    with on_cpu():
        assert not has_torch_function((torch.empty(0),))
    with torch.device("cpu"):
        assert has_torch_function((torch.empty(0),))
