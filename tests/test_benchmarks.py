"""The benchmarks run: on CPUs dry, on a made-up report, and for one launch of each kind."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compiled  # noqa: E402
import launches  # noqa: E402
import machine_code  # noqa: E402
import report  # noqa: E402
from machine_code import Instruction  # noqa: E402
from measure import cases, jobs, operators, worker  # noqa: E402


def run(
    script: str, *arguments: object, interpret: bool = False
) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS.parent), *sys.path])
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


WORKER = """
import os, time

def answer(connection):
    while True:
        job = connection.recv()
        if job["kernel"] == "dies":
            os._exit(1)
        if job["kernel"] == "hangs":
            time.sleep(60)
        connection.send({"status": "ok", "pid": os.getpid(), "fatal": job["kernel"] == "poisons"})
"""


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """A worker that does what the job says, and imports nothing large."""
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stand_in", raising=False)
    function: Callable[[Any], None] = importlib.import_module("stand_in").answer
    return function


def test_dry_run(tmp_path: Path) -> None:
    done = run("gpu.py", "--interpret", "--out", tmp_path / "deep" / "dry.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "deep" / "dry.json").read_text())
    assert written["dry_run"]
    assert written["machine"]["triton"]
    *kernels, model = written["results"]
    assert {row["kernel"] for row in kernels} == set(operators.OPERATORS)
    for row in kernels:
        assert row["status"] == "ok", row
        assert {"n", "rows", "dtype", "dim", "signs", "error", "ulps", "budget"} <= set(row)
        for entry in (row, row["clone"], *row["peers"].values()):
            assert {"median_ms", "p90_ms", "gb_per_s", "how"} <= set(entry)
    assert model["status"] == "ok"
    assert model["undo=none"]["seconds"] > 0


def test_without_gpu() -> None:
    done = run("gpu.py")
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU")
    assert len(done.stderr.splitlines()) == 1


def test_failures_stay_alone(answer: Callable[[Any], None]) -> None:
    names = ["works", "dies", "works", "hangs", "works", "poisons", "works", "works"]
    results: list[dict[str, Any]] = []
    worker.LIMIT["hangs"] = 1.0
    worker.run_all([{"kernel": k} for k in names], time.monotonic() + 60, results.append, answer)
    assert [r["kernel"] for r in results] == names
    assert [r["status"] for r in results] == ["ok", "error", "ok", "error", "ok", "ok", "ok", "ok"]
    assert results[1]["failed"] == "the process died"
    assert results[3]["failed"] == "no answer in 1 s"
    assert results[4]["pid"] == results[5]["pid"]
    assert results[6]["pid"] == results[7]["pid"] != results[5]["pid"]


def test_out_of_time(answer: Callable[[Any], None]) -> None:
    results: list[dict[str, Any]] = []
    worker.run_all([{"kernel": "works"}], time.monotonic() - 1, results.append, answer)
    assert results == [{"kernel": "works", "status": "skipped", "failed": "out of time"}]


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operators.OPERATORS["transform"]
    for name, factor in (("wrong", 1.0), ("nothing", float("nan"))):
        wrong = replace(right, call=lambda data, factor=factor: data.x * factor)
        monkeypatch.setitem(operators.OPERATORS, name, wrong)
        monkeypatch.setattr(jobs, "device", lambda: "cpu")
        monkeypatch.setattr(sys.modules["measure.oracle"], "device", lambda: "cpu")
        for dtype in cases.DTYPES:
            row = jobs.kernel_job(cases.case(name, 12, 5, dtype))
            assert row["status"] == "wrong"
            assert "median_ms" not in row


def test_plan() -> None:
    whole, quick = cases.plan(quick=False), cases.plan(quick=True)
    assert len(quick) < len(whole) / 2
    keys = [json.dumps(job, sort_keys=True) for job in whole]
    assert len(set(keys)) == len(keys)
    assert {job["n"] for job in whole if "n" in job} == set(cases.SIZES)
    for n in cases.MAIN:
        assert cases.case("transform", n, cases.large(n, "bf16"), "bf16") in quick
    for job in whole:
        assert job["kernel"] in jobs.JOBS
        assert cases.nbytes(job) <= cases.MAX_BYTES


def made_up(dry_run: bool = False) -> dict[str, Any]:
    time_ = {"median_ms": 0.2, "p90_ms": 0.21, "gb_per_s": 2700.0, "how": "flushed L2"}
    peers = {"HadaCore": {**time_, "median_ms": 0.3}, "dense": {"failed": "OutOfMemoryError"}}
    right = {
        **{"status": "ok", "error": 1.01, "ulps": 0.3, "budget": 1.1, **time_},
        **{"clone": {**time_, "gb_per_s": 3000.0}, "percent_of_clone": 90.0, "peers": peers},
    }
    results = [
        {**cases.case("transform", n, rows, dtype), **right}
        for n in (128, 4096)
        for dtype in cases.DTYPES
        for rows in (1, 16, cases.large(n, dtype))
    ]
    results.append({**cases.case("in place", 128, 1 << 20, "bf16", 0, True), **right})
    results.append({**cases.case("transform", 64, 1, "bf16"), "status": "wrong", "error": None})
    results.append({**cases.case("transform", 96, 1, "bf16"), "status": "error", "failed": "Oops"})
    results.append({**cases.case("transform", 32, 1, "bf16"), "status": "skipped"})
    run_ = {"seconds": 0.5, "all_seconds": [0.4, 0.5], "peak_bytes": 1 << 34, "model_bytes": 1}
    model = {"model": "Llama 8B", "rotations": ["R1", "R2"], "status": "ok"}
    results.append({"kernel": "apply", **model, "undo=none": run_})
    return {
        **{"kind": "measurement", "dry_run": dry_run, "date": "2000-01-01T00:00:00+00:00"},
        **{"tensor_bytes": cases.TENSOR_BYTES, "results": results},
        "machine": {"gpu": "Made Up", "driver": "1", "torch": "2", "triton": "3"},
    }


def test_report(tmp_path: Path) -> None:
    file = tmp_path / "made-up.json"
    file.write_text(json.dumps(made_up()))
    done = run("report.py", file)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "| transform | bf16 | 4096 | 2700 | 90 % | 1.01 | 1.50x | – |" in lines
    assert "| in place, first dimension, with signs | bf16 | 128 | 2700 | 90 % |" in done.stdout
    assert "| 4096 | fp16 | 200.0 | 200.0 |" in lines
    assert any("Llama 8B: 0.500 s (0.400 to 0.500), peak 16.0 GiB" in line for line in lines)
    assert "- error: transform 96 1 bf16 Oops" in lines
    assert "Cases: 20 ok, 1 wrong, 1 error, 1 skipped." in lines


def test_plots(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        file = tmp_path / "made-up.json"
        file.write_text(json.dumps(made_up()))
        done = run("report.py", file, "--plots", tmp_path)
        assert done.returncode == 1
        assert done.stderr == "plots need matplotlib: pip install 'fastrot[plots]'\n"
        return
    plots = importlib.import_module("plots")
    written = plots.plot(made_up(), tmp_path)
    assert {path.name for path in written} == {
        *(f"roofline-{dtype}.png" for dtype in cases.DTYPES),
        "time-over-rows-bf16.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize("content", [made_up(dry_run=True), {"kind": "prediction"}, {"rows": []}])
def test_report_refuses_what_is_no_measurement(tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"mean nothing|written by neither"):
        report.load(file)


def test_static_roofline(tmp_path: Path) -> None:
    file = tmp_path / "static.json"
    done = run(
        "static_roofline.py", "--sizes", 4096, "--arch", "sm_90", "--dtypes", "bf16", "--json", file
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Predicted from machine code, not measured")
    written = json.loads(file.read_text())
    assert written["kind"] == "prediction"
    (row,) = written["rows"]
    assert row["bytes_per_element"] == 4
    assert 1 < row["instructions_per_element"] < 100
    assert set(row["predicted"]) == {"H100", "H200"}
    predicted = row["predicted"]["H200"]
    assert 0 < predicted["percent_of_copy"] <= 100
    assert predicted["load"][predicted["bound"]] > 0.999
    (part,) = row["passes"]
    # As many instructions that multiply as the algebra needs: all were counted.
    assert part["products_over_needed"] == 1
    assert part["unit"] == "HGMMA"


@pytest.mark.parametrize("n", [64, 4096, 11008, 29568])
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("name", ["bf16", "fp32", "fp64"])
def test_launches(n: int, dim: int, name: str) -> None:
    """Nothing is rounded to 16 bits between passes, and the passes make the whole transform."""
    dtype = launches.DTYPES[name]
    made = launches.transform(n, dtype, dim, "sm_90")
    scratch = max(4, dtype.itemsize)
    assert sum(x.width for x in made) == 2 * dtype.itemsize + 2 * scratch * (len(made) - 1)
    for x in made:
        assert x.elements > 0
        assert all(dot.operations for dot in x.dots if dot.count)


def test_count() -> None:
    """Instructions per tile, with a loop as written, with one trip peeled off, and unrolled."""

    def code(*names: str) -> list[Instruction]:
        return [Instruction(name, -1) for name in names]

    def count(listing: list[Instruction], resident: int) -> tuple[float, int, float]:
        dot = compiled.Dot(16, 8, 16, 4)  # four instructions of one warp
        warps = {"num_warps": 1}
        launch = compiled.Launch("", None, {}, {}, warps, "", 1, 1, (dot,), 4, resident)
        return compiled.count(listing, launch)

    mma, back = "HMMA.16816.F32.BF16", Instruction("BRA", 1)
    assert count([*code("MOV", mma, "ADD"), back, *code("EXIT")], 0) == (14, 0, 1)
    assert count([*code("MOV", "ADD"), *code(mma), back, *code(mma, "EXIT")], 0) == (12, 0, 1)
    assert count(code(mma, mma, mma, mma, "EXIT"), 0) == (5, 0, 1)
    assert count([*code("MOV", mma, mma, mma, mma), back, *code("EXIT")], 2) == (5, 2, 1)


def test_instructions() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, RZ, !UPT ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   BRA `(.L_x_2);
"""
    names = [("MOV", -1), ("HGMMA.64x64x16.F32.BF16", -1), ("BRA", 1), ("EXIT", -1)]
    found = machine_code.read_sass(" REG:32 STACK:0 ", listing)
    assert found.code == names
    assert found.registers == 32


def test_scalar_products_count_only_alone() -> None:
    """Activations and norms multiply too, beside the matrices."""
    code = [Instruction(name, -1) for name in ("FFMA", "HMMA.16816.F32.BF16", "MOV")]
    assert machine_code.multipliers(code) == {"HMMA.16816.F32.BF16"}
    assert machine_code.multipliers(code[::2]) == {"FFMA"}
