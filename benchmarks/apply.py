"""Time of `fastrot.apply` beside llm-compressor's SpinQuantModifier, on the same model and machine.

    python benchmarks/apply.py --peer-python PEER/bin/python --json benchmarks/results/FILE

The peer runs in a virtual environment of its own, see `peers/llm_compressor.py`. Runs alternate
between the two, each in a fresh process, so that both see the same machine. Both keep memory that
was freed, and touch as much as they will need first: how fast a machine hands out fresh pages is
not what is measured here.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
CASES = (
    {"dtype": "float32", "rotations": ["R1", "R2"]},
    {"dtype": "bfloat16", "rotations": ["R1", "R2", "R4"]},
)
UNDO = ("none", "memory")
"""Without copies, and with every weight kept until the end, in case of an unforeseen error."""

KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "TOUCHED": str(3 << 30),
}
"""The environment of both: glibc gives no memory back, and how many bytes are touched."""

PEER = Path(__file__).parent / "peers" / "llm_compressor.py"


def rotate_once(request: dict[str, Any]) -> dict[str, Any]:
    """Build the model, rotate it, and take the time of the rotation alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastrot

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, request["dtype"]))
    # The first call compiles kernels (and finds them on disk the next time).
    small = {**request["config"], "hidden_size": 512, "vocab_size": 64, "num_hidden_layers": 1}
    fastrot.apply(LlamaForCausalLM(LlamaConfig(**small)), request["rotations"])
    model = LlamaForCausalLM(LlamaConfig(**request["config"])).eval()
    torch.ones(int(os.environ["TOUCHED"]), dtype=torch.uint8)
    start = time.perf_counter()
    fastrot.apply(model, request["rotations"], undo=request["undo"])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "version": fastrot.__version__}


def run(command: list[str], request: dict[str, Any]) -> dict[str, Any]:
    """One fresh process; its last line is the JSON answer."""
    output = subprocess.run(
        [*command, json.dumps(request)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | KEPT,
    ).stdout
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def main() -> None:
    """Run all cases, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", help="python of an environment with llm-compressor")
    parser.add_argument("--repeat", type=int, default=5, help="runs of fastrot per case")
    parser.add_argument("--peer-repeat", type=int, default=2, help="runs of the peer per case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(rotate_once(json.loads(arguments.once))))
        return
    rows = []
    for case in CASES:
        seconds: dict[str, list[float]] = {undo: [] for undo in UNDO}
        theirs, version = [], None
        for index in range(max(arguments.repeat, arguments.peer_repeat)):
            for undo in UNDO[: 2 * (index < arguments.repeat)]:
                request = {**case, "config": LLAMA, "undo": undo}
                answer = run([sys.executable, __file__, "--once"], request)
                seconds[undo].append(answer["seconds"])
            if arguments.peer_python and index < arguments.peer_repeat:
                answer = run([arguments.peer_python, str(PEER)], {**case, "config": LLAMA})
                theirs.append(answer["seconds"])
                version = answer["version"]
        print("+".join(case["rotations"]), case["dtype"])
        if theirs:
            print(f"  llm-compressor {version:12}{spread(theirs)}")
        ratios = {}
        for undo, ours in seconds.items():
            if theirs:
                ratios[undo] = statistics.median(theirs) / statistics.median(ours)
            ratio = f"   {ratios[undo]:.0f}x" if theirs else ""
            print(f"  fastrot, undo={undo:12}{spread(ours)}{ratio}", flush=True)
        rows.append(
            {
                **case,
                "fastrot_seconds": seconds,
                "peer_seconds": theirs,
                "peer_version": version,
                "ratio_of_medians": ratios,
            }
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def spread(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    import numba
    import torch
    import transformers

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
