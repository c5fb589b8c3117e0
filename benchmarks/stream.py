"""`fastrot rotate` beside a copy of the same files: rate, peak of memory, and address space.

    python benchmarks/stream.py FOLDER --json benchmarks/results/FILE

Writes a checkpoint of random bfloat16 weights to FOLDER (6.6 GB; it stays there), then takes turns
of `cp -r` and `sync` with `fastrot rotate --memory 512M` and `sync`, each into a new folder. The
source is read once before, so that both find of it in memory what fits, and before each turn the
free memory is written to once: in a virtual machine, who is first to touch it waits for the host
(on one machine a copy of 6.6 GB took 3 to 19 s without that). In the end, one rotation
with less address space than the checkpoint has bytes, and with `--peer-python`, a Python that has
llm-compressor, one by that.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
"""As Llama 3 8B, with fewer layers and words."""

SPACE = 5 << 30
"""Bytes of address space of the last rotation, fewer than the checkpoint has."""


def write(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of random weights, a layer at a time, unless it is there."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = LlamaConfig(**config, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    settings.save_pretrained(folder)
    with torch.device("meta"):
        names = {k: v.shape for k, v in LlamaForCausalLM(settings).state_dict().items()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in names.items():
        layer = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        tensors = {
            name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
    places = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TOUCH = """
import mmap
free = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemFree"))
memory = mmap.mmap(-1, (free << 10) * 9 // 10)
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
"""


def timed(command: list[str], space: int | None = None) -> tuple[float, float]:
    """Seconds of a command and of `sync`, and the most memory in GiB that it held."""

    def limit() -> None:
        if space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (space, space))

    subprocess.run(["sync"], check=True)
    subprocess.run([sys.executable, "-c", TOUCH], check=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=limit)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    """Take turns, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", default="512M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--peer-python", help="of an environment with llm-compressor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source, target = arguments.folder / "source", arguments.folder / "target"
    write(source, CONFIG | {"num_hidden_layers": arguments.layers})
    size = sum(path.stat().st_size for path in source.iterdir())
    rotate = [sys.executable, "-m", "fastrot", "rotate", str(source), str(target)]
    rotate += ["--rotations", "R1", "R2", "--memory", arguments.memory]
    commands = {"copy": ["cp", "-r", str(source), str(target)], "rotate": rotate}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(arguments.rounds + 1):
        for name, command in commands.items():
            found = timed(command)
            shutil.rmtree(target)
            if turn:  # the first finds out what is in memory, and compiles
                runs[name].append(found)
                print(f"{name}: {found[0]:.1f} s, {found[1]:.2f} GiB", flush=True)
    seconds = {name: statistics.median(s for s, _ in found) for name, found in runs.items()}
    limited = timed(rotate, SPACE)
    shutil.rmtree(target)
    report = {
        "bytes": size,
        "memory": arguments.memory,
        "layers": arguments.layers,
        "machine": f"{os.cpu_count()} cores {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("fastrot", "torch", "numba", "transformers")},
        "seconds": {name: sorted(s for s, _ in found) for name, found in runs.items()},
        "peak_gib": max(peak for _, peak in runs["rotate"]),
        "share_of_copy": seconds["copy"] / seconds["rotate"],
        "gb_per_s": size / seconds["rotate"] / 1e9,
        "address_space": {"bytes": SPACE, "seconds": limited[0], "peak_gib": limited[1]},
    }
    if arguments.peer_python:
        script = Path(__file__).parent / "peers" / "llm_compressor_files.py"
        found = timed([arguments.peer_python, str(script), str(source), str(target)])
        shutil.rmtree(target)
        report["llm_compressor"] = {
            "seconds": found[0],
            "peak_gib": found[1],
            "times_ours": found[0] / seconds["rotate"],
        }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
