"""The GPU kernels against float64 and against a copy: one command, one JSON, within nine minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu-h200.json

Every case is checked before it is timed, and one that fails, hangs or takes its process along is
recorded and left behind. The most important cases come first; what the time does not reach is
recorded as skipped. `--interpret` walks through all of it on a CPU, with tiny sizes, in Triton's
interpreter: its times mean nothing. `report.py` makes plots and a table from the file.

The parts are in `measure/`: cases, operators and peers, the oracle, timing, and the processes.
"""

import argparse
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from measure.cases import TENSOR_BYTES, Job, dry_plan, plan
from measure.worker import compile_ahead, run_all


def summary(result: Job) -> str:
    """A line for the screen."""
    words = [str(result["kernel"])]
    if "rows" in result:
        words += [f"{result['rows']} x {result['n']}", result["dtype"]]
        words += ["first dimension"] * (result["dim"] == 0) + ["signs"] * result["signs"]
    words += [result["status"]]
    if "median_ms" in result:
        words += [f"{1e3 * result['median_ms']:.1f} us,", f"{result['gb_per_s']:.0f} GB/s,"]
        words += [f"{result['percent_of_clone']:.0f} % of clone,", f"error {result['error']:.2f}"]
    words += [f"{u} {result[u]['seconds']:.3f} s" for u in result if u.startswith("undo=")]
    return " ".join([*words, result.get("failed", "")])


def main() -> None:
    """Run everything; write the file after every case, so that none is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, a smaller model")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes on a CPU, no figures")
    parser.add_argument("--compilers", type=int, default=min(12, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before the workers import Triton
    elif not torch.cuda.is_available():
        sys.exit("no GPU: run this where torch.cuda.is_available(), or with --interpret")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    # A job that is under way at the deadline is ended; the rest is for starting up and ending.
    deadline = start + 60 * arguments.minutes - min(15.0, 6 * arguments.minutes)
    jobs = dry_plan() if arguments.interpret else plan(arguments.quick)
    report: Job = {
        "kind": "measurement",
        "dry_run": arguments.interpret,
        "quick": arguments.quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": arguments.minutes,
        "tensor_bytes": TENSOR_BYTES,
        "machine": None,
        "results": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def record(result: Job) -> None:
        if result["kernel"] == "machine":
            report["machine"] = result
        else:
            report["results"].append(result)
        report["seconds"] = round(time.monotonic() - start, 1)
        # JSON knows no NaN, which a wrong kernel may well have.
        text = json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None), indent=1)
        arguments.out.write_text(text + "\n")
        print(summary(result), flush=True)

    if not arguments.interpret:
        share = start + 20 * arguments.minutes  # at most a third
        compile_ahead(jobs, share, arguments.compilers)
    run_all([{"kernel": "machine"}, *jobs], deadline, record)
    print(f"{len(report['results'])} cases in {report['seconds']} s: {arguments.out}")


if __name__ == "__main__":
    main()
