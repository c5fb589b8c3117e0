"""The device under test, and the facts that its figures depend on."""

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from measure.cases import Job

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "fast_hadamard_transform"),
    *("faster_hadamard_transform", "vllm", "llmcompressor"),
)


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on a CPU: times mean nothing then."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> str:
    """Where tensors live."""
    return "cpu" if interpreted() else "cuda"


def machine_facts() -> Job:
    """GPU, driver, clocks and versions."""
    facts: Job = {"gpu": None, "driver": None}
    if device() == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            **smi(),
        }
    import fastrot

    versions = {"fastrot": fastrot.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"status": "ok", **facts, "python": platform.python_version(), **versions}


def smi() -> Job:
    """Driver and limits from nvidia-smi, nothing where there is none."""
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        values = subprocess.check_output(command, text=True).strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(("driver", "sm_clock", "memory_clock", "power"), values, strict=False))


def import_fastrot() -> None:
    """Without psutil too: it is asked about a computer's memory, never about a GPU's."""
    missing = importlib.util.find_spec("psutil") is None
    if missing:
        from transformers import LlamaForCausalLM  # noqa: F401  (would find the stand-in)

        sys.modules["psutil"] = ModuleType("psutil")
    import fastrot  # noqa: F401

    if missing:
        del sys.modules["psutil"]
