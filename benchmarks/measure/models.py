"""Whole models with random weights: `fastrot.apply`, and the same by llm-compressor."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from measure.cases import Job
from measure.device import device

LOGITS = 1e-5
"""Admissible relative logit error of a rotated float32 model."""

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SMALLER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {"Llama 8B": LLAMA_8B, "Llama 1B": LLAMA_8B | SMALLER, "tiny": LLAMA_8B | TINY}


def build(shape: Job, dtype: torch.dtype) -> Any:
    """A random model, on the device from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device()):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def rotation_seconds(shape: Job, rotate: Callable[[Any], Any]) -> Job:
    """Of one rotation of a new bf16 model, with the peak of memory."""
    gc.collect()
    model = build(shape, torch.bfloat16)
    cuda = device() == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    rotate(model)
    if cuda:
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }


@torch.no_grad()
def apply_job(job: Job) -> Job:
    """`fastrot.apply`: exact on one float32 layer, then timed on the whole bf16 model."""
    import fastrot

    shape, rotations = MODELS[job["model"]], job["rotations"]
    small = {**shape, "num_hidden_layers": 1, "vocab_size": 512}
    model = build(small, torch.float32)
    tokens = torch.arange(32, device=device())[None]
    before = model(tokens).logits
    fastrot.apply(model, rotations)
    error = ((model(tokens).logits - before).norm() / before.norm()).item()
    status = "ok" if error <= LOGITS else "wrong"
    result: Job = {"logit_error": error, "budget": LOGITS, "status": status}
    del model, before
    rotation_seconds(small, lambda model: fastrot.apply(model, rotations))  # compiles
    for undo in ("none", "memory"):
        runs = [
            rotation_seconds(shape, lambda model, u=undo: fastrot.apply(model, rotations, undo=u))
            for _ in range(job["repeat"])
        ]
        seconds = sorted(run["seconds"] for run in runs)
        median = statistics.median(seconds)
        result[f"undo={undo}"] = {**runs[-1], "seconds": median, "all_seconds": seconds}
    return result


def llm_compressor_job(job: Job) -> Job:
    """The same by llm-compressor."""
    from llmcompressor.core import State
    from llmcompressor.modifiers.transform import SpinQuantModifier

    def rotate(model: Any) -> None:
        modifier = SpinQuantModifier(rotations=job["rotations"], transform_type="hadamard")
        state = State(model=model)
        modifier.on_initialize(state)
        modifier.on_calibration_start(state, None)

    return {"status": "ok", **rotation_seconds(MODELS[job["model"]], rotate)}
