"""A cell of the matrix: a server, a family, rotations, numbers; and how it is judged.

A cell is judged beside the unrotated checkpoint of its family in the same server and numbers. What
that can't do is not run; what fastrot refuses is refused; everything else must be right.
"""

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

from checkpoints import checkpoint
from engine import distance
from helpers import word_tokenizer
from quantized import quantize
from servers import SERVERS, Failure, measured

FAMILIES = {
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Mistral": "mistral",
    "Qwen3-MoE": "qwen3_moe",
    "Gemma 3": "gemma3_text",
}
ONLINE_R2 = {
    "type": "hadamard",
    "head_dim": 32,
    "apply": [
        {"targets": ["re:.*o_proj$"], "location": "input"},
        {"targets": ["re:.*o_proj$"], "location": "weight_input", "inverse": True},
    ],
}
RECIPES = {
    "R1R2": {"rotations": ("R1", "R2"), "transform_type": "random-hadamard"},
    "R4": {"rotations": ("R4",), "transform_type": "random-hadamard"},
    "R1-R4": {"rotations": ("R1", "R2", "R3", "R4"), "transform_type": "random-hadamard"},
    "R2 online": {"transform_config": {"config_groups": {"R2": ONLINE_R2}}},
}
BITS = {"W8A8": 8, "W4A16": 4}
NUMBERS = ("float32", "bfloat16", "W8A8", "W4A16", "fp8 KV")
# Of log-probabilities in float32. An unrotated checkpoint farther off than ASTRAY was not loaded
# as it is.
ROUNDING, ASTRAY = 2e-5, 0.2


class Cell(NamedTuple):
    """The names of its server, family, rotations and numbers."""

    server: str
    family: str
    rotations: str
    numbers: str

    def __str__(self):
        return "/".join(self)


CELLS = [Cell(s, f, r, n) for s in SERVERS for f in FAMILIES for n in NUMBERS for r in RECIPES]


@lru_cache(None)
def stored(family, rotations, bits):
    """A checkpoint, and what transformers makes of it in float32 where its weights are in bits."""
    folder = Path(mkdtemp(prefix="matrix-"))
    checkpoint(folder, FAMILIES[family], RECIPES.get(rotations))
    word_tokenizer(256).save_pretrained(folder)
    return folder, quantize(folder, bits) if bits else None


@lru_cache(None)
def unrotated(server, family, numbers):
    """What the unrotated checkpoint answers, or the failure, and its answer without rounding."""
    folder, exact = stored(family, None, BITS.get(numbers))
    got = measured(server, folder, numbers)
    if isinstance(got, Failure):
        return got, None
    if exact is None:
        exact = got[0].scores if numbers == "float32" else unrotated(server, family, "float32")[1]
    away = distance(got[0], exact)
    return (
        got[0]
        if away < ASTRAY
        else Failure(f"its answers are {away:.2f} nats from those without rounding", False)
    ), exact


def judge(cell):
    """What became of a cell, as it is recorded.

    Returns:
        ``status``: right, refused, not run, unproven (a rotation taken away does not show) or
        wrong. ``reason`` where it did not run; else ``distance`` of the log-probabilities from
        those without rounding, its ``limit``, and the least distance ``without`` a rotation.
    """
    plain, exact = unrotated(cell.server, cell.family, cell.numbers)
    if isinstance(plain, Failure):
        return {"status": "not run", "reason": plain.said}
    folder, rotated_exact = stored(cell.family, cell.rotations, BITS.get(cell.numbers))
    got = measured(cell.server, folder, cell.numbers)
    if isinstance(got, Failure):
        return {"status": "refused" if got.ours else "wrong", "reason": got.said}
    rotated, without = got
    same, limit = True, 2 * distance(plain, exact)
    if rotated_exact is not None:  # other weights were rounded
        exact = rotated_exact
    if cell.numbers == "float32":
        largest = (rotated.logprobs - plain.logprobs).abs().max()
        same, limit = rotated.tokens == plain.tokens and float(largest) < ROUNDING, ROUNDING
    away = distance(rotated, exact)
    least = {place: distance(answers, exact) for place, answers in without.items()}
    status = "right" if same and away < limit else "wrong"
    if status == "right" and any(far < 3 * limit for far in least.values()):
        status = "unproven"
    figures = {"distance": away, "limit": limit}
    if least:
        figures["without"] = min(least.values())
    return {"status": status, **{name: float(f"{value:.3g}") for name, value in figures.items()}}
