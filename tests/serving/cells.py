"""A cell of the matrix: a family, rotated and stored in one way, in one server.

Every server runs in a process of its own, forked from one that has imported everything and served
nothing. So a cell takes seconds, and no engine sees what another one left behind.
"""

import os
import sys
from multiprocessing import get_context

from checkpoints import checkpoint
from engine import answers, engine, rotations, without
from quantized import quantize
from vllm.platforms.cpu import CpuPlatform

ONLINE_R2 = {
    "type": "hadamard",
    "head_dim": 32,
    "apply": [
        {"targets": ["re:.*o_proj$"], "location": "input"},
        {"targets": ["re:.*o_proj$"], "location": "weight_input", "inverse": True},
    ],
}
RECIPES = {
    "R1-R4": {"rotations": ("R1", "R2", "R3", "R4"), "transform_type": "random-hadamard"},
    "R2 online": {"transform_config": {"config_groups": {"R2": ONLINE_R2}}},
}
SERVERS = {"vLLM": {}, "vLLM, models of transformers": {"model_impl": "transformers"}}
NUMBERS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "W4A16": {"dtype": "bfloat16"},
}


def stored(folder, family, recipe, numbers):
    """A checkpoint, and what transformers makes of it in float32 if its weights are in 4 bits."""
    made = checkpoint(folder, family, recipe)
    return made, quantize(made, 4) if numbers == "W4A16" else None


def measured(server, folder, numbers):
    """What a server answers, and what it does with the rotations of each online place taken away.

    Returns:
        The answers, and by place those without it.
    """
    with get_context("fork").Pool(1) as pool:
        return pool.apply_async(_vllm, (server, folder, numbers)).get(timeout=300)


def _vllm(server, folder, numbers):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    register = CpuPlatform.register_triton_kernel_overrides

    def registered(*_):
        # vLLM looks through all modules, and stumbles over an object of this one.
        hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if "llvmlite" in name}
        try:
            register()
        finally:
            sys.modules.update(hidden)

    CpuPlatform.register_triton_kernel_overrides = registered
    with engine(folder, **SERVERS[server], **NUMBERS[numbers]) as llm:
        [places] = llm.apply_model(rotations)
        got = answers(llm)
        return got, {place: without(llm, place) for place in places}
