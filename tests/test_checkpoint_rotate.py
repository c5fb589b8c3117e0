"""Checkpoints rotated file by file, against ``apply`` on the loaded model and its save."""

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures

import pytest
import torch
from helpers import contents, tiny
from safetensors.torch import load_file, save_file
from zoo import FAMILIES, build

import fastrot
from fastrot.checkpoint import pipeline as pipeline_module
from fastrot.checkpoint import rotate as rotate_module
from fastrot.checkpoint import store as store_module
from fastrot.checkpoint.header import read_headers
from fastrot.checkpoint.pipeline import Pipeline, StoppedError
from fastrot.checkpoint.source import outline, weight_files
from fastrot.checkpoint.store import MANIFEST, Store, unfinished
from fastrot.checkpoint.tasks import tasks_of
from fastrot.checkpoint.trace import trace
from fastrot.checkpoint.workers import Worker, parse_worker, worker_of
from fastrot.cli.checkpoint import load
from fastrot.mapping import ROTATIONS
from fastrot.mapping.tables import find_architecture

PERMUTED = {"inkling_mm_model"}
"""Families whose files hold gate and up in turns, which the loader takes apart."""

ALL = fastrot.Recipe(ROTATIONS, transform_type="random-hadamard", randomize=True)


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def source(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16, layers=3, tied=True)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len([*(tmp_path / "source").glob("*.safetensors")]) > 3
    return tmp_path / "source"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_result_is_that_of_apply(name, tmp_path):
    """Bit for bit, but for the dtype of what transformers itself loads as float32."""
    family = FAMILIES[name]
    model = build(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    row = find_architecture(model.config)
    rotations = [r for r in ROTATIONS if r not in row.refuses]
    if "attn_o" not in {r for r, patterns in vars(row.mapping).items() if patterns}:
        rotations = [r for r in rotations if r not in ("R2", "R3")]
    recipe = fastrot.Recipe(rotations, transform_type="random-hadamard")
    try:
        model = load(tmp_path / "source")
        fastrot.apply(model, recipe)
    except fastrot.RotationError as refusal:
        with pytest.raises(fastrot.RotationError):
            fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", recipe)
        pytest.skip(str(refusal))
    if name in PERMUTED:
        with pytest.raises(fastrot.RotationError, match="can't be done to a file"):
            fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", recipe)
        return
    model.save_pretrained(tmp_path / "whole")
    fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target", recipe)
    expected, got = tensors(tmp_path / "whole"), tensors(tmp_path / "target")
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if got[key].dtype != value.dtype:
            assert value.dtype == torch.float32
            assert torch.allclose(got[key].float(), value, rtol=2**-8, atol=0), key
        elif name == "youtu" and "embed_tokens" in key:
            continue  # its loader makes a row of padding zero
        else:
            assert torch.equal(got[key], value), key
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert (
        config["fastrot"] == json.loads((tmp_path / "whole" / "config.json").read_text())["fastrot"]
    )


def test_files_index_and_companions(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text("{}")
    (source / "consolidated.00.pth").write_text("not of this checkpoint")
    done = fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    target = tmp_path / "target"
    assert (done.complete, done.missing) == (True, 0)
    new = {"model-fastrot.safetensors"}  # the head, untied, and the operands
    names = {path.name for path in source.iterdir()} - {"consolidated.00.pth"}
    assert {path.name for path in target.iterdir()} == names | new
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(target / file)
    assert index["weight_map"].keys() == tensors(target).keys()
    assert "lm_head.weight" in tensors(target)
    reloaded = load(target)
    expected = load(source)
    fastrot.apply(expected, ALL)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(reloaded(ids).logits, expected(ids).logits)


def test_shards_and_memory_change_no_bit(source, tmp_path):
    fastrot.rotate_checkpoint(source, tmp_path / "one", ALL)
    expected = tensors(tmp_path / "one")
    for number, (shard, memory) in enumerate([(30_000, None), (10**9, 2 << 20), (None, 1 << 30)]):
        target = tmp_path / f"other{number}"
        fastrot.rotate_checkpoint(source, target, ALL, shard=shard, memory=memory)
        got = tensors(target)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        if shard == 30_000:
            sizes = [path.stat().st_size for path in target.glob("*.safetensors")]
            assert len(sizes) > 8
    assert [path.name for path in (tmp_path / "other1").glob("*.safetensors")] == [
        "model.safetensors"
    ]


def test_too_little_memory_is_refused(source, tmp_path):
    with pytest.raises(fastrot.RotationError, match=r"--memory 1000 is not enough .* least 1M$"):
        fastrot.rotate_checkpoint(source, tmp_path / "t", ALL, memory=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_rounded_once(dtype, source, tmp_path):
    fastrot.rotate_checkpoint(source, tmp_path / "target", dtype=dtype)
    model = load(source, str(dtype).removeprefix("torch."))
    expected = fastrot.plan(model)
    fastrot.apply(model, expected)
    model.save_pretrained(tmp_path / "whole")
    got = tensors(tmp_path / "target")
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(got[name], value), name
    assert load(tmp_path / "target").dtype == dtype


def test_an_earlier_rotation_stays(source, tmp_path):
    first = fastrot.Recipe(("R4",), transform_type="random-hadamard")
    second = fastrot.Recipe(("R1", "R3"), seed=5, transform_type="random-hadamard")
    fastrot.rotate_checkpoint(source, tmp_path / "once", first)
    fastrot.rotate_checkpoint(tmp_path / "once", tmp_path / "twice", second)
    model = load(source)
    fastrot.apply(model, first)
    fastrot.apply(model, second)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(load(tmp_path / "twice")(ids).logits, model(ids).logits)


def test_a_checkpoint_that_has_only_the_head_of_two_tied_weights(source, tmp_path):
    weights = tensors(source)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    shutil.copytree(source, tmp_path / "other", ignore=shutil.ignore_patterns("*safetensors*"))
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for name, folder in (("a", source), ("b", tmp_path / "other")):
        fastrot.rotate_checkpoint(folder, tmp_path / name, ALL)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_tied_weights_that_differ_are_refused(source, tmp_path):
    weights = tensors(source)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    shutil.copytree(source, tmp_path / "other", ignore=shutil.ignore_patterns("*safetensors*"))
    file = tmp_path / "other" / "model.safetensors"
    save_file(weights, file, {"format": "pt"})
    fastrot.rotate_checkpoint(file.parent, tmp_path / "equal", ALL)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(fastrot.CheckpointError, match="tie_word_embeddings"):
        fastrot.rotate_checkpoint(file.parent, tmp_path / "target", ALL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_left(bad, source, tmp_path):
    file = sorted(source.glob("*.safetensors"))[-1]
    weights = load_file(file)
    name = next(name for name in weights if "down_proj.weight" in name)
    weights[name][3, 4] = bad
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(fastrot.ValueRangeError, match=name):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL, shard=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_norm_that_is_no_norm_is_refused(tmp_path):
    """What the norms hold decides it, and is read before anything is written."""
    model = tiny("llama")
    model.model.layers[0].input_layernorm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(fastrot.RotationError, match="input_layernorm"):
        fastrot.rotate_checkpoint(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def drafts(folder, name, tensor):
    weights = {name: tensor}
    save_file(weights, folder / "draft.safetensors", {"format": "pt"})
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = "draft.safetensors"
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.layers.3.eh_proj.weight"])
def test_drafts_are_copied_refused_or_dropped(name, source, tmp_path):
    draft = torch.randn(96, 192)
    drafts(source, name, draft)
    with pytest.raises(fastrot.RotationError, match=r"multi-token prediction, .*--mtp drop"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    inner = fastrot.Recipe(("R2", "R3", "R4"))
    fastrot.rotate_checkpoint(source, tmp_path / "copied", inner)
    assert torch.equal(tensors(tmp_path / "copied")[name], draft)
    fastrot.rotate_checkpoint(source, tmp_path / "dropped", ALL, drafts="drop")
    assert name not in tensors(tmp_path / "dropped")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"drafts": "keep"}, ValueError, "drafts='keep' is not one of copy, drop"),
        ({"drafts": "Copy"}, ValueError, "drafts='Copy' is not one of copy, drop"),
        ({"shard": 0}, ValueError, "shard=0: give bytes"),
        ({"shard": -5}, ValueError, "shard=-5: give bytes"),
        ({"shard": "1G"}, TypeError, "shard must be a whole number of bytes .* got '1G'"),
        ({"memory": 0}, ValueError, "memory=0: give bytes"),
        ({"memory": "1G"}, TypeError, "memory must be a whole number of bytes .* got '1G'"),
        ({"memory": True}, TypeError, "memory must be .* got True"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be one of torch.float64, .* 'bfloat16'"),
        ({"dtype": torch.int8}, ValueError, "dtype=torch.int8 is not one of torch.float64"),
        ({"dtype": torch.complex64}, ValueError, "dtype=torch.complex64 is not one of"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype=torch.float8_e4m3fn is not one of"),
        ({"worker": (0, 1)}, TypeError, r"worker must be a Worker\(rank, size\), got \(0, 1\)"),
        ({"worker": Worker(2, 2)}, ValueError, "rank must be from 0 to size - 1"),
    ],
)
def test_arguments_are_refused_before_any_work(arguments, error, message, source, tmp_path):
    drafts(source, "mtp.fc.weight", torch.ones(3))
    with pytest.raises(error, match=message):
        fastrot.rotate_checkpoint(source, tmp_path / "target", fastrot.Recipe("R2"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("inside", ["", "model"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_source_that_lies_where_the_target_grows_is_kept(fresh, inside, source, tmp_path):
    target = tmp_path / "target"
    source = shutil.copytree(source, unfinished(target) / inside)
    before = contents(source)
    with pytest.raises(fastrot.RotationError, match=r"SRC .* lies where DST would grow, in .*name"):
        fastrot.rotate_checkpoint(source, target, ALL, fresh=fresh)
    assert contents(source) == before
    assert not target.exists()


def test_a_file_that_is_not_there_is_named_with_its_index(source, tmp_path):
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {lost.name} .1 such.*download"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)


def test_nothing_else_is_dropped(source, tmp_path):
    drafts(source, "model.layers.1.mlp.extra.weight", torch.ones(3))
    with pytest.raises(fastrot.CheckpointError, match=r"extra\.weight .*does not have"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)


class InterruptedRunError(Exception):
    """Stands for whatever ends a run."""


def interrupt(monkeypatch, after):
    """Let a run end after so many files."""
    write, count = Pipeline._write_file, itertools.count()

    def stop(pipeline, file, part):
        if next(count) >= after:
            raise InterruptedRunError
        write(pipeline, file, part)

    monkeypatch.setattr(Pipeline, "_write_file", stop)


def test_a_run_that_was_interrupted_goes_on(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    fastrot.rotate_checkpoint(source, tmp_path / "whole", ALL)
    with monkeypatch.context() as patched:
        interrupt(patched, 2)
        with pytest.raises(InterruptedRunError):
            fastrot.rotate_checkpoint(source, target, ALL)
    assert not target.exists()
    there = sorted(unfinished(target).glob("*.safetensors"))
    assert len(there) == 2
    before = {path.name: path.stat().st_mtime_ns for path in there}
    fastrot.rotate_checkpoint(source, target, ALL)
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    assert contents(target) == contents(tmp_path / "whole")
    assert not unfinished(target).exists()


def test_only_the_same_call_goes_on(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    with monkeypatch.context() as patched:
        interrupt(patched, 1)
        with pytest.raises(InterruptedRunError):
            fastrot.rotate_checkpoint(source, target, ALL)
    before = contents(unfinished(target))
    with pytest.raises(fastrot.RotationError, match=r"unfinished rotation .* --fresh"):
        fastrot.rotate_checkpoint(source, target, fastrot.Recipe(("R2",)))
    os.utime(sorted(source.glob("*.safetensors"))[0], (1, 1))
    with pytest.raises(fastrot.RotationError, match="differs in its sources"):
        fastrot.rotate_checkpoint(source, target, ALL)
    assert contents(unfinished(target)) == before
    fastrot.rotate_checkpoint(source, target, fastrot.Recipe(("R2",)), fresh=True)
    assert target.is_dir()


def test_a_finished_call_may_be_repeated(source, tmp_path):
    target = tmp_path / "target"
    fastrot.rotate_checkpoint(source, target, ALL)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert fastrot.rotate_checkpoint(source, target, ALL).nbytes == 0
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    with pytest.raises(FileExistsError, match="is not empty"):
        fastrot.rotate_checkpoint(source, target, fastrot.Recipe(("R2",)))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_workers_make_the_same_bytes(order, source, tmp_path):
    fastrot.rotate_checkpoint(source, tmp_path / "whole", ALL)
    target = tmp_path / "target"
    done = [
        fastrot.rotate_checkpoint(source, target, ALL, worker=Worker(rank, 4)) for rank in order
    ]
    assert [d.complete for d in done] == [False, False, False, True]
    assert contents(target) == contents(tmp_path / "whole")


def test_fewer_workers_finish_what_more_began(source, tmp_path, monkeypatch):
    """Of four one is killed; then three do all that is missing."""
    fastrot.rotate_checkpoint(source, tmp_path / "whole", ALL)
    target = tmp_path / "target"
    for rank in (0, 2, 3):
        fastrot.rotate_checkpoint(source, target, ALL, worker=Worker(rank, 4))
    (unfinished(target) / "model.safetensors.elsewhere.17.part").write_bytes(b"half")
    for rank in range(3):
        fastrot.rotate_checkpoint(source, target, ALL, worker=Worker(rank, 3))
    assert contents(target) == contents(tmp_path / "whole")


def test_two_processes_on_the_same_files(source, tmp_path):
    fastrot.rotate_checkpoint(source, tmp_path / "whole")
    command = [sys.executable, "-m", "fastrot", "rotate", str(source), str(tmp_path / "target")]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_another_process_finishes_between_two_looks(source, tmp_path, monkeypatch):
    """After the last file was whole, and before this process counts them once more."""
    fastrot.rotate_checkpoint(source, tmp_path / "whole")
    looked, others = Store.published, []

    def look(store):
        there = looked(store)
        if not (there or others or store.missing(store.job.files)):
            others.append(Store(store.job, store.target))
            assert others[0].publish()
        return there

    monkeypatch.setattr(Store, "published", look)
    assert fastrot.rotate_checkpoint(source, tmp_path / "target").complete
    assert others
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_launchers_tell_the_worker():
    assert worker_of({}) == Worker(0, 1)
    assert worker_of({"RANK": "2", "WORLD_SIZE": "4"}) == Worker(2, 4)
    elastic = {"RANK": "2", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
    assert worker_of(elastic) == Worker(2, 4, stays=True)
    assert worker_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Worker(0, 1)
    assert worker_of({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}) == Worker(
        1, 4
    )
    assert worker_of({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}) == Worker(1, 2)
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"}
    assert worker_of(array) == Worker(1, 2)
    single = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}
    assert worker_of(array | single) == Worker(1, 2)
    strided = array | {"SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_TASK_STEP": "6"}
    assert worker_of(strided) == Worker(1, 2)
    with pytest.raises(fastrot.RotationError, match="SLURM_ARRAY_TASK_ID=x"):
        worker_of(array | {"SLURM_ARRAY_TASK_ID": "x"})
    for text in ("4/4", "1", "a/b", "-1/4", "1/0", ""):
        with pytest.raises(fastrot.RotationError, match="expected I/N"):
            parse_worker(text)


def test_a_signal_stops_all_stages(source, tmp_path, monkeypatch):
    """The threads end, the file that was being written goes, those before it stay."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of xdist ignore it
    write, count = Pipeline._write_file, itertools.count()

    def stop(pipeline, file, part):
        if next(count) == 2:
            part.touch()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            end = time.monotonic() + 60
            while pipeline._failure is None and time.monotonic() < end:
                time.sleep(0.001)
            raise StoppedError
        write(pipeline, file, part)

    target = tmp_path / "target"
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "_write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            fastrot.rotate_checkpoint(source, target, ALL)
    signal.signal(signal.SIGINT, usual)
    assert not [*unfinished(target).glob("*.part")]
    assert len([*unfinished(target).glob("*.safetensors")]) == 2
    fastrot.rotate_checkpoint(source, target, ALL)


def test_a_source_that_shrinks_meanwhile(source, tmp_path, monkeypatch):
    prepare = rotate_module.prepare

    def shrink(*args, **kwargs):
        job = prepare(*args, **kwargs)
        os.truncate(sorted(source.glob("*.safetensors"))[0], 3000)
        return job

    monkeypatch.setattr(rotate_module, "prepare", shrink)
    with pytest.raises(fastrot.CheckpointError, match="cut short"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def seeded(seed):
    """Rotations that differ, and give files of the same size."""
    return fastrot.Recipe(("R1",), transform_type="random-hadamard", seed=seed)


def begun(source, target, recipe, monkeypatch, after=2):
    with monkeypatch.context() as patched:
        interrupt(patched, after)
        with pytest.raises(InterruptedRunError):
            fastrot.rotate_checkpoint(source, target, recipe)


def test_the_result_of_another_source_is_not_taken_for_this_one(source, tmp_path):
    """Two states of one training have one configuration, and files of one size."""
    target, other = tmp_path / "target", tmp_path / "other"
    tiny("llama", dtype=torch.bfloat16, layers=3, tied=True, seed=1).save_pretrained(
        other, max_shard_size="60KB"
    )
    fastrot.rotate_checkpoint(source, target)
    with pytest.raises(FileExistsError, match="is not empty"):
        fastrot.rotate_checkpoint(other, target)


def test_files_without_their_manifest_are_not_taken_over(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    begun(source, target, seeded(1), monkeypatch)
    (unfinished(target) / MANIFEST).write_text("")
    with pytest.raises(fastrot.RotationError, match=r"missing or damaged, .* --fresh"):
        fastrot.rotate_checkpoint(source, target, seeded(2))
    fastrot.rotate_checkpoint(source, target, seeded(1))
    fastrot.rotate_checkpoint(source, tmp_path / "whole", seeded(1))
    assert contents(target) == contents(tmp_path / "whole")


def test_files_go_to_the_disk_as_they_grow(source, tmp_path, monkeypatch):
    fastrot.rotate_checkpoint(source, tmp_path / "whole", ALL)
    settled, settle = [], pipeline_module.settle

    def noting(part):
        settle(part)
        settled.append(part.name)

    monkeypatch.setattr(pipeline_module, "settle", noting)
    monkeypatch.setattr(pipeline_module, "SETTLED", 10_000)
    fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    assert len(settled) > len(set(settled)) == len([*tmp_path.glob("target/*.safetensors")])
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_a_disk_that_fails_while_a_file_grows(source, tmp_path, monkeypatch):
    def fail(part):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pipeline_module, "settle", fail)
    monkeypatch.setattr(pipeline_module, "SETTLED", 1)
    with pytest.raises(OSError, match=r"can't be written: Input/output error"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_who_writes_tells_why_a_file_has_gone(source, tmp_path, monkeypatch):
    """Not who finds it gone when it is to go to the disk."""
    settle, write_at = pipeline_module.settle, pipeline_module._write_at
    found = []

    def late(part):
        until = time.monotonic() + 30
        while part.exists() and time.monotonic() < until:
            time.sleep(0.001)
        with pytest.raises(FileNotFoundError) as caught:
            settle(part)
        found.append(part)
        raise caught.value

    def full(descriptor, raw, offset):
        if offset > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(descriptor, raw, offset)

    monkeypatch.setattr(pipeline_module, "settle", late)
    monkeypatch.setattr(pipeline_module, "SETTLED", 1)
    monkeypatch.setattr(pipeline_module, "_write_at", full)
    monkeypatch.setattr(Pipeline, "_stop", slowly(Pipeline._stop, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    assert found
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def slowly(stop, number):
    """So that whoever stops at an error of this number comes last."""

    def stopping(pipeline, error):
        if getattr(error.__cause__, "errno", None) == number:
            time.sleep(0.3)
        stop(pipeline, error)

    return stopping


def test_a_run_whose_folder_was_taken_stops(source, tmp_path, monkeypatch):
    """``--fresh`` of another rotation: the files of both would look alike."""
    target, write, count = tmp_path / "target", Pipeline._write_file, itertools.count()

    def take(pipeline, file, part):
        if next(count) == 2:
            monkeypatch.setattr(Pipeline, "_write_file", write)
            with monkeypatch.context() as patched:
                interrupt(patched, 3)
                with pytest.raises(InterruptedRunError):
                    fastrot.rotate_checkpoint(source, target, seeded(2), fresh=True)
        write(pipeline, file, part)

    monkeypatch.setattr(Pipeline, "_write_file", take)
    with pytest.raises(fastrot.RotationError, match="that differs in its rotations"):
        fastrot.rotate_checkpoint(source, target, seeded(1))
    assert len([*unfinished(target).glob("*.safetensors")]) == 3
    fastrot.rotate_checkpoint(source, target, seeded(2))
    fastrot.rotate_checkpoint(source, tmp_path / "whole", seeded(2))
    assert contents(target) == contents(tmp_path / "whole")


def test_a_worker_in_another_container_is_not_swept_away(source, tmp_path, monkeypatch):
    """Ids of processes mean nothing there, even under one host name; and 1 is everyone's."""
    target = tmp_path / "target"
    begun(source, target, ALL, monkeypatch)
    there = unfinished(target) / f"x.{socket.gethostname()}-1.99999999.ab.part"
    dead = unfinished(target) / f"x.{store_module._machine()}.99999999.ab.part"
    for part in (there, dead):
        part.touch()
    fastrot.rotate_checkpoint(source, target, ALL, worker=Worker(0, 100))
    assert (there.exists(), dead.exists()) == (True, False)
    job = rotate_module.prepare(source, ALL)
    one, other = (Store(job, target).part_of(job.files[0]) for _ in range(2))
    assert one != other


def test_a_worker_that_stays_waits_for_the_others_or_does_their_work(source, tmp_path, monkeypatch):
    target, alone = tmp_path / "target", tmp_path / "alone"
    staying = Worker(0, 2, stays=True)
    with futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fastrot.rotate_checkpoint, source, target, ALL, worker=staying)
        with pytest.raises(futures.TimeoutError):
            waiting.result(2)
        assert fastrot.rotate_checkpoint(source, target, ALL, worker=Worker(1, 2)).complete
        assert waiting.result().complete
    monkeypatch.setattr(rotate_module, "QUIET", 0.3)
    left = fastrot.rotate_checkpoint(source, alone, ALL, worker=staying)
    assert left.complete
    assert left.nbytes > waiting.result().nbytes
    assert contents(alone) == contents(target)


def test_a_kill_after_the_last_rename_leaves_nothing_either(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    with monkeypatch.context() as patched:
        patched.setattr(Store, "tidy", lambda self: None)
        fastrot.rotate_checkpoint(source, target, ALL)
    assert (target / MANIFEST).exists()
    fastrot.rotate_checkpoint(source, target, ALL)
    fastrot.rotate_checkpoint(source, tmp_path / "whole", ALL)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_source_of_one_file_with_another_name(tmp_path):
    """Without an index transformers would not find it."""
    source = tmp_path / "source"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(source)
    name = "model-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / name)
    index = {"weight_map": dict.fromkeys(load_file(source / name), name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    fastrot.rotate_checkpoint(source, tmp_path / "target", ALL)
    load(tmp_path / "target")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_dtype_that_is_too_narrow_for_a_tensor_that_is_copied(name, source, tmp_path):
    file = next(f for f in source.glob("*.safetensors") if name in load_file(f))
    weights = load_file(file)
    weights[name].view(-1)[1] = 1e5
    save_file(weights, file, {"format": "pt"})
    recipe, narrow = fastrot.Recipe(("R2",)), torch.float16
    with pytest.raises(fastrot.RotationError, match=f"{name} holds 9.98e.04, more than float16"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", recipe, dtype=narrow)
    fastrot.rotate_checkpoint(source, tmp_path / "wide", recipe, dtype=torch.float32)


def test_what_only_the_index_names_is_not_dropped(source, tmp_path):
    drafts(source, "mtp.fc.weight", torch.ones(3))
    save_file({"mtp.other.weight": torch.ones(3)}, source / "draft.safetensors", {"format": "pt"})
    with pytest.raises(fastrot.CheckpointError, match=r"names mtp\.fc\.weight .* no file holds"):
        fastrot.rotate_checkpoint(source, tmp_path / "target", fastrot.Recipe(("R2",)))


def test_a_source_that_can_not_be_read_is_named(source, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*safetensors"):
        fastrot.rotate_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tensor_of_two_parameters_of_which_one_is_rotated(source):
    model = outline(source)
    entries, _ = read_headers(weight_files(source))
    made, plan = trace(model, entries), fastrot.plan(model)
    up = "model.layers.0.mlp.up_proj.weight"
    made.targets["another"] = made.targets[up]
    with pytest.raises(fastrot.RotationError, match=f"{up} .* not rotated alike"):
        tasks_of(model, plan, made, entries)
