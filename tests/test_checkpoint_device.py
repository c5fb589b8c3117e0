"""Checkpoints rotated on a GPU: on one, or by its kernels in Triton's interpreter."""

import os

import pytest
import torch
from helpers import contents, tiny
from safetensors.torch import load_file
from test_checkpoint_fp8 import BLOCK, settle, written

import fastrot
from fastrot.checkpoint import device as device_module
from fastrot.checkpoint import rotate as rotate_module
from fastrot.checkpoint.device import CPU, LOCAL_RANKS, Memory, device_of
from fastrot.checkpoint.job import prepare
from fastrot.checkpoint.panels import Panel
from fastrot.checkpoint.rotate import shares_of
from fastrot.checkpoint.store import Store
from fastrot.checkpoint.target import readable
from fastrot.checkpoint.verify import verify_checkpoint
from fastrot.cli.arguments import _bytes
from fastrot.kernels import cpu_weight
from fastrot.kernels.gpu_weight import TritonRotation
from fastrot.mapping import ROTATIONS

ALL = fastrot.Recipe(ROTATIONS, transform_type="random-hadamard")
DENSE = fastrot.Recipe(("R1", "R2"), transform_type="random-matrix")
GPU = torch.device("cuda:0")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
interprets = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreted"
)


def saved(folder, dtype=torch.float32, **config):
    tiny("llama", dtype=dtype, **config).save_pretrained(folder, max_shard_size="60KB")
    return folder


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_one_rounding(got, expected):
    """Each entry is a neighbour of the expected one, or as far off as float32's arithmetic."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if not value.is_floating_point():  # an operand
            assert torch.equal(got[name], value), name
            continue
        step = torch.finfo(value.dtype).eps * value.double().abs().clamp(min=2.0**-20)
        assert ((got[name].double() - value.double()).abs() <= step).all(), name


@pytest.fixture
def apart(monkeypatch):
    """The CPU as a device with memory of its own, on which Triton's kernels run; what they did."""
    done = {"rotations": 0, "places": []}

    class Counted(TritonRotation):
        def run(self, source, target, workspace):
            done["rotations"] += 1
            super().run(source, target, workspace)

    def rotate(panel, memory, norms, workspace, usual=Panel.rotate):
        done["places"].append(memory.data_ptr())
        usual(panel, memory, norms, workspace)

    make = Memory.on.__func__

    def on(cls, device, nbytes):
        made = make(cls, device, nbytes)
        made.host.fill_(0)
        made.work.fill_(0)
        done.setdefault("hosts", set()).add(made.host.data_ptr())
        return made

    for module in (device_module, rotate_module):
        monkeypatch.setattr(module, "is_apart", lambda device: True)
    monkeypatch.setattr(cpu_weight, "MatrixRotation", Counted)
    monkeypatch.setattr(Panel, "rotate", rotate)
    monkeypatch.setattr(Memory, "on", classmethod(on))
    return done


@interprets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recipe", [ALL, DENSE])
def test_panels_go_there_and_back(dtype, recipe, tmp_path, apart, request):
    source = saved(tmp_path / "source", dtype, hidden=48, heads=3, kv_heads=3, layers=1)
    fastrot.rotate_checkpoint(source, tmp_path / "there", recipe)
    assert apart["rotations"] > 0 or recipe is DENSE
    assert apart["places"]
    assert not apart["hosts"] & set(apart["places"])
    request.getfixturevalue("monkeypatch").undo()
    fastrot.rotate_checkpoint(source, tmp_path / "here", recipe)
    assert_one_rounding(tensors(tmp_path / "there"), tensors(tmp_path / "here"))
    assert verify_checkpoint(source, tmp_path / "there", recipe)


@interprets
def test_codes_are_decoded_there(tmp_path, apart, monkeypatch):
    source, _ = written(tiny("llama", hidden=48, heads=3, kv_heads=3, layers=1), tmp_path)
    fastrot.rotate_checkpoint(source, tmp_path / "there", ALL, dtype=torch.float32)
    assert not apart["hosts"] & set(apart["places"])
    monkeypatch.undo()
    fastrot.rotate_checkpoint(source, tmp_path / "here", ALL, dtype=torch.float32)
    assert_one_rounding(tensors(tmp_path / "there"), tensors(tmp_path / "here"))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("recipe", [ALL, DENSE, fastrot.Recipe(ROTATIONS)])
def test_on_a_gpu(dtype, recipe, tmp_path):
    """The same weights as on the CPU to one rounding, and the same bits in panels of any size."""
    source = saved(tmp_path / "source", dtype, hidden=256, heads=4, kv_heads=2, intermediate=688)
    fastrot.rotate_checkpoint(source, tmp_path / "here", recipe)
    for name, memory in (("there", None), ("small", 32 << 20)):
        fastrot.rotate_checkpoint(source, tmp_path / name, recipe, memory=memory, device="cuda")
    assert_one_rounding(tensors(tmp_path / "there"), tensors(tmp_path / "here"))
    assert verify_checkpoint(source, tmp_path / "there", recipe)
    if recipe is not DENSE:
        assert contents(tmp_path / "there") == contents(tmp_path / "small")


@needs_gpu
def test_codes_on_a_gpu(tmp_path):
    source, _ = written(tiny("llama"), tmp_path)
    fastrot.rotate_checkpoint(source, tmp_path / "there", ALL, device="cuda")
    fastrot.rotate_checkpoint(source, tmp_path / "here", ALL)
    assert_one_rounding(tensors(tmp_path / "there"), tensors(tmp_path / "here"))


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says to have three GPUs, of which two are of one kind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    kinds = {0: (9, 0), 1: (9, 0), 2: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: kinds[device.index])
    for name in LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)


def test_a_device_has_an_index(gpus):
    assert device_of("cpu") == device_of("cpu:0") == CPU
    assert device_of("cuda:2", {"LOCAL_RANK": "1"}) == torch.device("cuda:2")
    assert device_of(GPU) == GPU
    assert device_of("cuda", {}) == torch.device("cuda:1")
    for rank, index in (("0", 0), ("2", 2), ("7", 1)):
        assert device_of("cuda", {"LOCAL_RANK": rank}) == torch.device("cuda", index)
    assert device_of("cuda", {"SLURM_LOCALID": "5"}) == torch.device("cuda:2")
    with pytest.raises(fastrot.RotationError, match="LOCAL_RANK=x: expected a number"):
        device_of("cuda", {"LOCAL_RANK": "x"})


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("cuda:3", "--device cuda:3: the last of 3 GPUs here is cuda:2"),
        ("gpu", "--device gpu is none: expected cpu, cuda or cuda:1"),
        ("meta", "--device meta: weights are rotated on cpu and on cuda"),
    ],
)
def test_a_device_that_is_not_there(device, why, gpus, tmp_path):
    source = saved(tmp_path / "source")
    with pytest.raises(fastrot.RotationError, match=why):
        fastrot.rotate_checkpoint(source, tmp_path / "target", device=device)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu(tmp_path, capsys):
    from fastrot.cli import main

    source = saved(tmp_path / "source")
    command = ["rotate", str(source), str(tmp_path / "target"), "--device", "cuda"]
    assert main(command) == 2
    assert "--device cuda: torch" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert main([*command[:-1], "cpu"]) == 0


def test_kinds_of_devices_do_not_mix(gpus, tmp_path):
    """Not in an unfinished target, and not as files that would be taken for whole."""
    source, target = saved(tmp_path / "source"), tmp_path / "target"
    jobs = [
        prepare(source, ALL, device=torch.device(d)) for d in ("cpu", "cuda:0", "cuda:1", "cuda:2")
    ]
    Store(jobs[1], target).open()
    Store(jobs[2], target).open()
    for job, now in ((jobs[0], "'cpu'"), (jobs[3], "'cuda 8.0'")):
        with pytest.raises(fastrot.RotationError, match=rf"its device \('cuda 9.0', now {now}\)"):
            Store(job, target).open()
    heads = [job.files[0].head for job in jobs]
    assert heads[1] == heads[2]
    assert len(set(heads)) == 3


def test_a_gpu_with_too_little_memory(gpus, tmp_path, monkeypatch):
    job = prepare(saved(tmp_path / "source"), ALL, device=GPU)
    free = 64 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    with pytest.raises(
        fastrot.RotationError, match=r"cuda:0 has 64M free, and --memory 2\.00G .* or --device cpu"
    ):
        shares_of(job)
    shares = shares_of(job, free)
    assert shares.panels + shares.scratch <= free
    with pytest.raises(fastrot.RotationError, match="cuda:0 has 64M free"):
        shares_of(job, free + 1)
    assert shares_of(prepare(job.source, ALL), free + 1)


def test_a_gpu_needs_room_for_dense_matrices(gpus, tmp_path, monkeypatch):
    """R1 is a matrix of 96 x 96 in float64; the scratch memory is the largest weight in it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    source = saved(tmp_path / "source", intermediate=640)
    shares = shares_of(prepare(source, DENSE, device=GPU), 8 << 20)
    assert shares.scratch == 640 * 96 * 8
    assert 8 * 96**2 <= (8 << 20) - shares.scratch - shares.panels <= 2 * 8 * 96**2


def test_the_least_memory_that_is_named_is_enough(tmp_path):
    """Though a panel of what may be cut grows with it, and takes nine times that as float64."""
    source = saved(tmp_path / "source", torch.bfloat16, vocab=40_000)
    job = prepare(source, DENSE, dtype=torch.float64)
    with pytest.raises(fastrot.RotationError, match=r"give at least (\d+)M") as refusal:
        shares_of(job, 1000)
    least = int(str(refusal.value).split()[-1].removesuffix("M")) << 20
    shares = shares_of(job, least)
    assert shares.panels + shares.scratch <= least


def test_sizes_are_rounded_up():
    """What a message names is given back."""
    for nbytes in (1, (1 << 20) + 1, (1 << 30) + 1, 5 * 10**9, 3 << 29, (7 << 30) + (1 << 28)):
        text = readable(nbytes)
        assert nbytes <= _bytes(text) <= nbytes + (1 << 20) + nbytes // 50
    assert readable(3 << 29) == "1.50G"


def test_other_blocks_of_the_same_codes_are_another_source(tmp_path):
    """As many factors fit blocks of several sizes, and only config.json tells which."""
    source, _ = written(tiny("llama", layers=1), tmp_path)
    digests = []
    for block in (BLOCK, (BLOCK[0] + 1, BLOCK[1]), BLOCK):
        settle(source, quant_method="fp8", weight_block_size=list(block))
        digests.append(prepare(source, ALL).digest)
    assert digests[0] == digests[2] != digests[1]
