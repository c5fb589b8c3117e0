"""The command line: what it writes, what it prints, and what it refuses in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from helpers import logits, random_ids, relative_error, tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import fastrot
from fastrot.checkpoint.pipeline import Pipeline, StoppedError
from fastrot.cli import main
from fastrot.demo import evaluate

ROTATIONS = ("R1", "R2", "R3", "R4")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint in each dtype, with everything that lies beside weights."""
    folders = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        folder = folders[name] = tmp_path_factory.mktemp("models") / name
        model = tiny("llama", dtype=dtype, tied=True)
        model.save_pretrained(folder)
        add_tokenizer(folder, model.config.vocab_size)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "LICENSE").write_text("do what you like")
        (folder / "optimizer.bin").write_text("not of this checkpoint")
    return folders


def add_tokenizer(folder, size):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@pytest.fixture
def source(checkpoints, tmp_path):
    """A checkpoint of its own for a test that spoils it."""
    return shutil.copytree(checkpoints["float32"], tmp_path / "source")


def run(capsys, *arguments):
    capsys.readouterr()  # progress bars of what the test itself loaded and saved
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan_prints_the_plan(checkpoints, capsys):
    expected = fastrot.plan(load(checkpoints["float32"]), ROTATIONS, randomize=True, seed=3)
    arguments = ("plan", checkpoints["float32"], "--rotations", "r1", "R2", "r3", "R4")
    options = ("--randomize", "--seed", 3)
    status, out, err = run(capsys, *arguments, *options)
    assert (status, err) == (0, "")
    assert out.startswith(f"{expected}\n1 file of weights, 1M to write; --memory 1M or more, 2.00G")
    status, out, _ = run(capsys, *arguments, *options, "--json")
    data = json.loads(out)
    assert status == 0
    assert data["seed"] == 3
    assert data["transform_config"] == json.loads(json.dumps(expected.transform_config.to_dict()))
    assert [row["name"] for row in data["rows"]] == [row["name"] for row in expected.rows()]
    assert data["needs"]["disk"] > 4 * expected.shapes["lm_head.weight"][0] * 96


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--dtype", "bfloat16"],
        ["--dtype", "float64"],
        ["--max-shard-size", "100K"],
        ["--mtp", "drop"],
        ["--mtp", "copy", "--keep-head"],
        ["--dtype", "bfloat16", "--max-shard-size", "60K", "--mtp", "drop"],
    ],
)
def test_plan_says_what_rotate_writes(options, source, tmp_path, capsys):
    if "--mtp" in options:
        weights = source / "model.safetensors"
        draft = {"mtp.fc.weight": torch.ones(96, 192)}
        save_file(load_file(weights) | draft, weights, {"format": "pt"})
    options = [*options, "--rotations", *ROTATIONS]
    status, out, err = run(capsys, "plan", source, "--json", *options)
    assert (status, err) == (0, "")
    needs = json.loads(out)["needs"]
    target = tmp_path / "target"
    short = run(capsys, "rotate", source, target, *options, "--memory", needs["memory"] - 1)
    assert (short[0], target.exists()) == (2, False)
    assert run(capsys, "rotate", source, target, *options, "--memory", needs["memory"])[0] == 0
    written = [*target.glob("*.safetensors")]
    assert needs["files"] == len(written)
    assert needs["disk"] == sum(file.stat().st_size for file in written)


def test_plan_refuses_what_rotate_refuses(source, capsys):
    weights = source / "model.safetensors"
    save_file(load_file(weights) | {"mtp.fc.weight": torch.ones(9)}, weights, {"format": "pt"})
    status, out, err = run(capsys, "plan", source, "--mtp", "copy")
    assert (status, out) == (2, "")
    assert "--mtp drop" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotations", [("R1", "R2"), ROTATIONS])
def test_rotate_then_verify(checkpoints, dtype, rotations, tmp_path, capsys):
    source, target = checkpoints[dtype], tmp_path / "target"
    options = ("--transform-type", "random-hadamard", "--seed", 5)
    status, out, err = run(capsys, "rotate", source, target, *options, "--rotations", *rotations)
    assert (status, err) == (0, "")
    assert out.startswith(f"LlamaForCausalLM: {', '.join(rotations)}, seed 5;")
    rotated, expected = load(target), load(source)
    assert rotated.dtype == getattr(torch, dtype)
    fastrot.apply(expected, rotations, transform_type="random-hadamard", seed=5)
    ids = random_ids(expected, 2, 12, seed=0)
    assert torch.equal(logits(rotated, ids), logits(expected, ids))
    status, out, err = run(
        capsys, "verify", "--full", source, target, "--prompts", "w1 w2 w3", "w9"
    )
    assert (status, err) == (0, "")
    assert "4 random ones of 64 tokens, 2 given" in out
    assert "verified: the same function" in out


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_rotate_takes_along_what_belongs_to_the_checkpoint(checkpoints, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    source, target = checkpoints["float32"], tmp_path / "target"
    assert run(capsys, "rotate", source, target)[0] == 0
    assert names(target) == names(source) - {"optimizer.bin"}
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert names(tmp_path) == {"target"}
    assert target.stat().st_mode == source.stat().st_mode


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_rotate_stores_the_dtype_it_is_told(checkpoints, tmp_path, capsys):
    source, target = checkpoints["bfloat16"], tmp_path / "target"
    assert run(capsys, "rotate", source, target, "--dtype", "float32")[0] == 0
    assert load(target).dtype == torch.float32
    # Nothing was rounded to 16 bits, so the strict bound of float32 holds.
    status, out, _ = run(capsys, "verify", "--full", source, target)
    assert (status, "tolerance 1.00e-05" in out) == (0, True)


def spoil(folder, name, change):
    edit_weights(folder, lambda weights: weights.update({name: change(weights[name])}))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_finds_one_wrong_head(checkpoints, dtype, tmp_path, capsys):
    source, target = checkpoints[dtype], tmp_path / "target"
    run(capsys, "rotate", source, target)
    name = "model.layers.1.self_attn.o_proj.weight"
    spoil(target, name, lambda weight: torch.cat((-weight[:, :16], weight[:, 16:]), 1))
    status, out, err = run(capsys, "verify", "--full", source, target)
    assert (status, err) == (1, "")
    assert "FAILED: not the same function" in out


def test_verify_finds_a_small_error_in_float32(checkpoints, tmp_path, capsys):
    source, target = checkpoints["float32"], tmp_path / "target"
    run(capsys, "rotate", source, target)
    # One rounding too many.
    name = "model.layers.0.mlp.up_proj.weight"
    spoil(target, name, lambda weight: weight.bfloat16().float())
    assert run(capsys, "verify", "--full", source, target)[0] == 1


def test_verify_finds_lost_online_rotations(checkpoints, tmp_path, capsys):
    source, target = checkpoints["float32"], tmp_path / "target"
    run(capsys, "rotate", source, target, "--rotations", "R4")
    config = json.loads((target / "config.json").read_text())
    for name in ("fastrot", "quantization_config", "experts_implementation"):
        del config[name]
    (target / "config.json").write_text(json.dumps(config))
    edit_weights(target, lambda weights: [weights.pop(n) for n in list(weights) if "fastrot" in n])
    assert run(capsys, "verify", "--full", source, target)[0] == 1


def test_not_a_number_is_not_verified(checkpoints, tmp_path, capsys):
    source = checkpoints["float32"]
    target = shutil.copytree(source, tmp_path / "target")
    spoil(target, "model.norm.weight", lambda weight: weight * torch.nan)
    assert run(capsys, "verify", "--full", source, target)[0] == 1


def test_verify_obeys_tolerance_and_precision(checkpoints, tmp_path, capsys):
    source, target = checkpoints["bfloat16"], tmp_path / "target"
    run(capsys, "rotate", source, target)
    assert run(capsys, "verify", "--full", source, target, "--tolerance", 1e-6)[0] == 1
    assert run(capsys, "verify", "--full", source, target, "--tolerance", 1)[0] == 0
    status, out, _ = run(capsys, "verify", "--full", source, target, "--precision", "float64")
    assert (status, "computed in        float64" in out) == (0, True)


def test_the_default_tolerance_is_that_of_one_rounding(checkpoints, tmp_path, capsys):
    """Noise as large as a rounding to bfloat16 moves the logits as much as that rounding does."""
    from fastrot.verification import add_rounding_noise

    exact, rounded, noisy = (load(checkpoints["bfloat16"]).float() for _ in range(3))
    fastrot.apply(rounded)
    rounded = rounded.bfloat16().float()
    add_rounding_noise(noisy, torch.finfo(torch.bfloat16).eps)
    ids = random_ids(exact, 4, 32, seed=0)
    actual, budget = (relative_error(logits(m, ids), logits(exact, ids)) for m in (rounded, noisy))
    assert 0.5 * budget < actual < 1.5 * budget


def test_prompts_from_a_file(checkpoints, tmp_path, capsys):
    source, file = checkpoints["float32"], tmp_path / "prompts.txt"
    file.write_text("w1 w2\n\n   \nw5 w6 w7\n")
    status, out, _ = run(capsys, "verify", "--full", source, source, "--prompts-file", file)
    assert (status, "2 given" in out) == (0, True)
    assert "relative error     0.00e+00" in out
    assert f"{4 * 64 + 5} of {4 * 64 + 5} positions" in out


@pytest.mark.parametrize("seed", [-(1 << 63), (1 << 64) - 1])
def test_the_outermost_seeds(seed, checkpoints, capsys):
    source = checkpoints["float32"]
    assert run(capsys, "verify", source, source, "--seed", seed)[0] == 0


def test_a_seed_that_torch_does_not_take(checkpoints):
    model = load(checkpoints["float32"])
    with pytest.raises(fastrot.RotationError, match=r"^seed=18446744073709551616: expected"):
        fastrot.verify(model, model, seed=1 << 64)


def test_prompts_are_utf_8_wherever_they_are_read(checkpoints, tmp_path):
    source, file = checkpoints["float32"], tmp_path / "prompts.txt"
    file.write_text("wörter", encoding="utf-8")
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    result = in_a_child(["verify", source, source, "--prompts-file", file], env=ascii_only)
    assert (result.returncode, result.stderr) == (0, "")


def no_config(folder):
    (folder / "config.json").unlink()


def no_json(folder):
    (folder / "config.json").write_text("{")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_the_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def weight_missing(folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def weight_unknown(folder):
    edit_weights(folder, lambda weights: weights.update({"model.mtp.weight": torch.ones(3)}))


def wrong_shape(folder):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))


def quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "fastrot-of-tomorrow"})


def other_type(folder):
    edit_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def unknown_type(folder):
    edit_config(folder, model_type="llama-of-tomorrow")


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rotated(folder):
    model = load(folder)
    fastrot.apply(model)
    model.save_pretrained(folder)


def other_vocabulary(folder):
    target = folder.with_name("target")
    tiny("llama", vocab=72).save_pretrained(target)


def index(folder, place):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = load_file(folder / "part.safetensors")
    weight_map = dict.fromkeys(names, place)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def weights_elsewhere(folder):
    index(folder, "../part.safetensors")


def weights_somewhere(folder):
    index(folder, "/part.safetensors")


def part_missing(folder):
    index(folder, "other.safetensors")


def no_index(folder):
    index(folder, 7)


def own_code(folder):
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})


def many_tokens(folder):
    edit_config(folder, vocab_size=10**8)


def many_layers(folder):
    edit_config(folder, num_hidden_layers=10**6)


def dangling_tokenizer(folder):
    (folder / "tokenizer.model").symlink_to(folder / "nowhere")


def full_target(folder):
    folder.with_name("target").mkdir()
    (folder.with_name("target") / "file").touch()


def target_is_a_file(folder):
    folder.with_name("target").touch()


def latin(folder):
    (folder / "LICENSE").write_bytes(b"w1 caf\xe9")


def blank(folder):
    (folder / "LICENSE").write_text("\n   \n")


def nothing(folder):
    pass


REFUSALS = [
    ([], nothing, "the following arguments are required: COMMAND (see fastrot --help)"),
    (["rotat"], nothing, "invalid choice: 'rotat'"),
    (["rotate", "S"], nothing, "required: DST (see fastrot rotate --help)"),
    (["rotate", "S", "T", "--rotations", "R5"], nothing, "invalid choice: 'R5'"),
    (["rotate", "S", "T", "--rotations", "R1", "r1"], nothing, "rotation R1 is named twice"),
    (["rotate", "S", "T", "--block-size", "0"], nothing, "'0' is not a positive integer"),
    (["rotate", "S", "T", "--block-size", "36"], nothing, "block_size=36 does not divide 96"),
    (["rotate", "S", "T", "--precision", "bfloat16"], nothing, "invalid choice: 'bfloat16'"),
    (["rotate", "S", "S"], nothing, "DST is SRC"),
    (["rotate", "S", "S/."], nothing, "DST is SRC"),
    (["rotate", "S", "T"], full_target, "is not empty, and nothing is overwritten"),
    (["rotate", "S", "T"], target_is_a_file, "is a file"),
    (["rotate", "S", "S/new"], nothing, "lies in SRC"),
    (["rotate", "S", "/tmp/" + "n" * 256], nothing, "File name too long"),
    (["rotate", "S", "/proc"], nothing, "is not empty"),
    (["rotate", "S", "/proc/new"], nothing, "/proc has 0M free, and the weights that are"),
    (["rotate", "S", "T"], weights_elsewhere, "lies in '../part.safetensors', outside of the fold"),
    (["rotate", "S", "T"], weights_somewhere, "lies in '/part.safetensors', outside of the fold"),
    (["verify", "S", "S"], weights_elsewhere, "lies in '../part.safetensors', outside of the fold"),
    (["rotate", "S", "T"], part_missing, "other.safetensors"),
    (["rotate", "S", "T"], no_index, "has no weight_map from names of weights to names of files"),
    (["rotate", "S", "T"], own_code, "load it in Python with trust_remote_code=True, then call"),
    (["rotate", "S", "T"], many_tokens, "but config.json describes"),
    (["plan", "S"], many_layers, "num_hidden_layers=1000000"),
    (["rotate", "S", "T"], dangling_tokenizer, "tokenizer.model"),
    (["rotate", "S", "T/a/b"], nothing, "where b should lie, is not a folder"),
    (["rotate", "T", "S/new"], nothing, "is not the folder of a transformers model"),
    (["rotate", "S", "T"], no_config, "no config.json"),
    (["rotate", "S", "T"], no_json, "not a valid JSON file"),
    (["rotate", "S", "T"], no_weights, "model.safetensors"),
    (["rotate", "S", "T"], half_the_weights, "cut short"),
    (["rotate", "S", "T"], weight_missing, "the checkpoint lacks model."),
    (["rotate", "S", "T"], weight_unknown, "of multi-token prediction, model.mtp"),
    (
        ["rotate", "S", "T"],
        wrong_shape,
        "the checkpoint has model.norm.weight as (3,), but config.json describes (96,)",
    ),
    (["plan", "S"], quantized, "fastrot-of-tomorrow"),
    (["plan", "S"], unknown_type, "llama-of-tomorrow"),
    (["rotate", "S", "T"], other_type, "which a GPT2LMHeadModel does not have"),
    (["rotate", "S", "T"], rotated, "R1 and R2 is already on this LlamaForCausalLM"),
    (["verify", "S", "T"], nothing, "is not the folder of a transformers model"),
    (["verify", "--full", "S", "T"], nothing, "is not the folder of a transformers model"),
    (["verify", "S", "S"], nothing, "has no record of a rotation; --full compares logits"),
    (["verify", "S", "S", "--prompts", "w1"], no_tokenizer, "has no tokenizer"),
    (["verify", "S", "S", "--prompts", " "], nothing, "prompt ' ' has no tokens"),
    (["verify", "S", "S", "--prompts-file", "T"], nothing, "No such file"),
    (["verify", "S", "S", "--tolerance", "-1"], nothing, "is negative or no number"),
    (["verify", "S", "S", "--tolerance", "nan"], nothing, "is negative or no number"),
    (["verify", "--full", "S", "T"], other_vocabulary, "has a vocabulary of 64"),
    (["verify", "S", "S", "--full", "--learned", "T"], nothing, "which need no recipe; leave it"),
    (
        ["verify", "S", "S", "--seed", "1", "--learned", "T"],
        nothing,
        "/target: --full and its opti",
    ),
    (["verify", "S", "S", "--learned", "S"], nothing, "/source is a folder; give a file"),
    (
        ["verify", "S", "S", "--seed", str(1 << 64)],
        nothing,
        f"--seed {1 << 64}: expected a whole n",
    ),
    (["verify", "S", "S", "--prompts-file", "S/LICENSE"], latin, "LICENSE is no text in UTF-8"),
    (["verify", "S", "S", "--prompts-file", "S/LICENSE"], blank, "LICENSE has no prompt; give one"),
    (["plan", "S", "--learned", "S"], nothing, "/source is a folder; give a file"),
    (["plan", "--rotations", "R1", "S"], nothing, "/source' (choose from R1, R2, R3, R4; folders"),
    (
        ["rotate", "S", "T", "--worker", "2/2"],
        nothing,
        "error: --worker 2/2: expected I/N",
    ),
    (["rotate", "S", "T", "--worker", "x"], nothing, "error: --worker x: expected I/N with"),
    (["rotate", "S", "T", "--memory", "1K"], nothing, "error: --memory 1K is not enough for"),
    (["rotate", "S", "T", "--memory", "1.5K"], nothing, "--memory 1536 is not enough"),
    (["demo", "--seed", str(-(1 << 63) - 1)], nothing, "--seed -9223372036854775809: expected a"),
    (["demo", "--bytes", "none"], nothing, "'none' is not a positive integer"),
    (["demo", "--json", "T/a/b"], nothing, "is not a folder"),
]


@pytest.mark.parametrize(("arguments", "prepare", "message"), REFUSALS)
def test_refusals_take_one_line(arguments, prepare, message, source, tmp_path, capsys):
    prepare(source)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {"S": str(source), "T": str(tmp_path / "target")}
    filled = ["/".join([places.get(p, p) for p in text.split("/", 1)]) for text in arguments]
    status, out, err = run(capsys, *filled)
    assert (status, out) == (2, "")
    assert err.startswith("fastrot: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 900
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert names(tmp_path) <= {"source", "target"}


def test_debug_shows_the_traceback(source):
    with pytest.raises(FileExistsError, match="is not empty"):
        main(["rotate", str(source), str(source.parent), "--debug"])


def test_a_mistake_of_ours_is_not_hidden(source, monkeypatch):
    def broken(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("fastrot.plan", broken)
    with pytest.raises(AssertionError):
        main(["plan", str(source)])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "fastrot: interrupted"),
        (MemoryError(), 2, "fastrot: error: MemoryError"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_after_a_failure(
    checkpoints, error, status, line, there, tmp_path, monkeypatch, capsys
):
    """The weights are on disk already when it happens."""
    write = Pipeline._write_file

    def fail(pipeline, file, part):
        write(pipeline, file, part)
        assert names(tmp_path) == {part.parent.name} | ({"target"} if there else set())
        raise error

    target = tmp_path / "target"
    if there:
        target.mkdir()
    monkeypatch.setattr(Pipeline, "_write_file", fail)
    got, out, err = run(capsys, "rotate", checkpoints["float32"], target)
    assert (got, out) == (status, "")
    assert line in err
    assert err.count("\n") == 1
    assert names(tmp_path) == ({"target"} if there else set())
    assert not there or names(target) == set()


@pytest.fixture
def deadly(number):
    """A signal that ends a process, also below nohup, where SIGHUP is ignored."""
    before = signal.signal(number, signal.SIG_DFL)
    yield number
    signal.signal(number, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminated_run_leaves_nothing(
    checkpoints, deadly, status, tmp_path, monkeypatch, capsys
):
    """If no file was whole; else it is resumed, see test_checkpoint_rotate.py."""
    write = Pipeline._write_file

    def stop(pipeline, file, part):
        signal.pthread_kill(threading.main_thread().ident, deadly)
        write(pipeline, file, part)
        raise StoppedError

    monkeypatch.setattr(Pipeline, "_write_file", stop)
    got, _, err = run(capsys, "rotate", checkpoints["float32"], tmp_path / "target")
    assert (got, err) == (status, "fastrot: terminated\n")
    assert names(tmp_path) == set()
    assert signal.getsignal(deadly) == signal.SIG_DFL


@pytest.mark.parametrize("stage", ["read", "write", "settle"])
def test_a_signal_while_the_stages_start(checkpoints, stage, tmp_path, monkeypatch, capsys):
    start = threading.Thread.start

    def late(thread):
        if thread.name == f"fastrot-{stage}":
            signal.raise_signal(signal.SIGTERM)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", late)
    got, _, err = run(capsys, "rotate", checkpoints["float32"], tmp_path / "target")
    assert (got, err) == (143, "fastrot: terminated\n")
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fastrot-")]
    assert names(tmp_path) == set()


def test_an_error_in_the_middle_keeps_its_cause(checkpoints, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("a memory bank failed")

    monkeypatch.setattr("fastrot.checkpoint.panels.Panel.rotate", fail)
    status, out, err = run(capsys, "rotate", checkpoints["float32"], tmp_path / "target")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "a memory bank failed" in err
    assert names(tmp_path) == set()


def test_a_full_disk_takes_one_line(checkpoints, tmp_path):
    """A limit on the size of files fails like a full disk does: while the weights are written."""
    code = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (65536, 65536))"
    result = in_a_child(["rotate", checkpoints["float32"], tmp_path / "target"], code)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "the weights can't be written" in result.stderr
    assert names(tmp_path) == set()


def in_a_child(arguments, code="", **options):
    code = f"{code}\nfrom fastrot.cli import run; run()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "text": True} | options
    return subprocess.run(command, stderr=subprocess.PIPE, **options)


def closed_stdout():
    return {"preexec_fn": lambda: os.close(1), "stdout": None}


def full_stdout():
    return {"stdout": open("/dev/full", "w")}


def ascii_terminal():
    return {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}}


PLAIN, ODD = "target", os.fsdecode(b"tar\xffget")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (closed_stdout, PLAIN),
        (full_stdout, ODD),
        (ascii_terminal, ODD),
        *(
            pytest.param(options, name, marks=pytest.mark.exhaustive)
            for options, name in [
                (closed_stdout, ODD),
                (full_stdout, PLAIN),
                (ascii_terminal, PLAIN),
            ]
        ),
    ],
)
def test_nothing_is_refused_that_is_done(checkpoints, options, name, tmp_path):
    target = tmp_path / name
    result = in_a_child(
        ["rotate", checkpoints["float32"], target, "--rotations", "R4"], **options()
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert names(target) >= {"config.json", "model.safetensors"}


def test_a_plan_on_an_ascii_terminal(checkpoints):
    """Factors stand behind a dot in the table."""
    result = in_a_child(["plan", checkpoints["float32"]], **ascii_terminal())
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\xb7 model.norm.weight" in result.stdout


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_follow_the_umask(checkpoints, umask, tmp_path, capsys):
    before = os.umask(umask)
    try:
        assert run(capsys, "rotate", checkpoints["float32"], tmp_path / "target")[0] == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "target").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_model_of_zeros_is_itself(source, tmp_path, capsys):
    edit_weights(source, lambda weights: [weight.zero_() for weight in weights.values()])
    assert run(capsys, "verify", "--full", source, source)[0] == 0
    target = shutil.copytree(source, tmp_path / "target")
    spoil(target, "model.embed_tokens.weight", lambda weight: weight + 1)
    spoil(target, "model.norm.weight", lambda weight: weight + 1)
    assert run(capsys, "verify", "--full", source, target)[0] == 1


def test_a_model_of_few_positions(tmp_path, capsys):
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    source, target = tmp_path / "source", tmp_path / "target"
    GPT2LMHeadModel(config).save_pretrained(source)
    add_tokenizer(source, 64)
    assert run(capsys, "rotate", source, target)[0] == 0
    status, out, _ = run(capsys, "verify", "--full", source, target)
    assert (status, "4 random ones of 32 tokens" in out) == (0, True)
    status, _, err = run(capsys, "verify", "--full", source, target, "--prompts", "w1 " * 33)
    assert (status, err.count("\n")) == (2, 1)
    assert "32 positions can't read prompts with token" in err


def test_someone_else_takes_the_folder_meanwhile(checkpoints, tmp_path, monkeypatch, capsys):
    target = tmp_path / "target"

    def take(source, folder):
        target.mkdir(exist_ok=True)
        (target / "precious").touch()

    with monkeypatch.context() as patched:
        patched.setattr("fastrot.checkpoint.store.copy_companions", take)
        status, _, err = run(capsys, "rotate", checkpoints["float32"], target)
    assert (status, "is not empty any more" in err) == (2, True)
    assert names(target) == {"precious"}
    (target / "precious").unlink()
    assert run(capsys, "rotate", checkpoints["float32"], target)[0] == 0
    assert names(tmp_path) == {"target"}


def test_settings_of_transformers_come_back(checkpoints, capsys):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    run(capsys, "plan", checkpoints["float32"])
    run(capsys, "plan", checkpoints["float32"].parent)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before


def test_demo_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(evaluate.run.__kwdefaults__, "steps", 5)
    status, out, err = run(capsys, "demo", "--bytes", 512, "--json", tmp_path / "demo.json")
    assert (status, err) == (0, "")
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["evaluated_bytes"] == 512
    assert len(data["rows"]) == 10
    for row in data["rows"]:
        assert f"{row['perplexity']:.3f}" in out


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["rotate", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"fastrot {fastrot.__version__}\n")
    for command in ("plan", "rotate", "verify", "serve", "demo"):
        assert f"    {command} " in out


def test_a_reader_that_goes_away(checkpoints):
    read, write = os.pipe()
    os.close(read)
    code = "from fastrot.cli import run; run()"
    command = [sys.executable, "-c", code, "plan", str(checkpoints["float32"])]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_plan_needs_no_weights(source, capsys):
    """Shapes alone decide: the same table with and without the weights."""
    status, whole, _ = run(capsys, "plan", str(source), "--rotations", "R1", "R4")
    (source / "model.safetensors").unlink()
    status_without, table, err = run(capsys, "plan", str(source), "--rotations", "R1", "R4")
    assert (status, status_without, err) == (0, 0, "")
    assert whole.startswith(table)
    assert whole.removeprefix(table).startswith("1 file of weights")


def test_architectures_prints_the_document(capsys):
    from fastrot.mapping.document import architectures_document

    assert run(capsys, "architectures") == (0, architectures_document(), "")
