"""``fastrot.verify``: do two models compute the same logits?

How far may they differ? In exact arithmetic not at all, and floating point adds about 1e-6 in
float32. But the weights of a rotated model were rounded once, to the dtype they are stored in, and
how much that moves the logits depends on the model. So it is measured: noise of the size of such a
rounding is put on the original's weights. Twice what it does is allowed.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrot.checks import check_model
from fastrot.errors import RotationError
from fastrot.transform_config import parse_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = {torch.float32: 1e-5, torch.float64: 1e-6}
"""The relative error of the logits that arithmetic alone may make."""

RANDOM_PROMPTS = (4, 64)
"""Number and length of random prompts."""

SEEDS = range(-(1 << 63), 1 << 64)
"""What a generator of torch takes."""


@dataclass(frozen=True)
class Verification:
    """How far two models agree; it counts as true if that is enough.

    Attributes:
        error: norm of the difference of all logits over the norm of the original's.
        tolerance: the greatest error that is allowed.
        largest: the largest difference of two logits.
        same: at how many positions the greedy next token is the same.
        positions: of how many.
    """

    error: float
    tolerance: float
    largest: float
    same: int
    positions: int

    def __bool__(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "verified: the same function" if self else "FAILED: not the same function"
        return "\n".join(
            (
                f"max logit error    {self.largest:.2e}",
                f"relative error     {self.error:.2e}, tolerance {self.tolerance:.2e}",
                f"greedy next token  the same at {self.same} of {self.positions} positions",
                verdict,
            )
        )


def verify(
    original: "PreTrainedModel",
    rotated: "PreTrainedModel",
    prompts: Sequence[Tensor] = (),
    *,
    tolerance: float | None = None,
    precision: torch.dtype | str = "float32",
    seed: int = 0,
) -> Verification:
    """Compare the logits of two models on prompts; neither is changed.

    Args:
        original: before the rotation.
        rotated: after it.
        prompts: token ids ``(batch, length)``; four random ones of 64 tokens are added.
        tolerance: greatest relative error; default what arithmetic in ``precision`` makes, or twice
            what rounding the weights to the dtype of ``rotated`` does to ``original``.
        precision: to compute in; a model of another dtype is copied, one at a time.
        seed: of the random prompts.

    Raises:
        RotationError: the vocabularies differ, a prompt does not fit the models, or ``seed`` has
            more than 64 bits.
        TypeError: something that is no model.
    """
    dtype = parse_precision(precision)
    check_seed(seed)
    for model in (original, rotated):
        check_model(model)
    check_vocabularies(original, rotated)
    ids = [*random_prompts(rotated, seed), *prompts]
    stored = coarsest(rotated)
    got = logits(_in(rotated, dtype), ids)
    expected = logits(_in(original, dtype), ids)
    if tolerance is None:
        noisy: Any = copy.deepcopy(original)
        tolerance = allowed(noisy.to(dtype), ids, expected, stored)
    return judge(got, expected, tolerance)


def _in(model: Any, dtype: torch.dtype) -> Any:
    same = all(p.dtype == dtype for p in model.parameters())
    if same:
        return model
    copied: Any = copy.deepcopy(model)
    return copied.to(dtype)


def coarsest(model: nn.Module) -> float:
    """Distance from 1 to the next number, in the coarsest dtype of a model's weights."""
    return max(torch.finfo(weight.dtype).eps for weight in model.parameters())


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of ``expected``; all tensors together."""
    difference = _norm([a - b for a, b in zip(got, expected, strict=True)])
    norm = _norm(expected)
    if not norm:
        return math.inf if difference else 0.0
    return difference / norm


def allowed(
    original: Any,
    prompts: Sequence[Tensor],
    expected: Sequence[Tensor],
    eps: float,
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = relative_error,
) -> float:
    """What ``error`` may be after rounding the weights once. Puts noise on ``original``."""
    add_rounding_noise(original, eps)
    noise = error(logits(original, prompts), expected)
    return max(EXACT[next(original.parameters()).dtype], 2 * noise)


def judge(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> Verification:
    """How far logits agree."""
    pairs = list(zip(got, expected, strict=True))
    return Verification(
        relative_error(got, expected),
        tolerance,
        max(float((a - b).abs().max()) for a, b in pairs),
        sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
        sum(e.shape[:-1].numel() for e in expected),
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


@torch.no_grad()
def add_rounding_noise(model: nn.Module, eps: float) -> None:
    """Add what a rounding does to weights that were rotated.

    All entries of a rotated row are about as large as its root mean square, and so are the errors
    of all, wherever the original row was small.

    Args:
        model: float32 or float64.
        eps: distance from 1 to the next number of the dtype that is rounded to.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 0.5
        scale = eps * weight.square().mean(-1, keepdim=True).sqrt()
        weight.add_(noise.to(weight.device) * scale)


def check_seed(seed: int, name: str = "seed=") -> None:
    """Refuse a seed that torch has no generator for; ``name`` is what stands before its value."""
    if seed not in SEEDS:
        raise RotationError(f"{name}{seed}: expected a whole number from -2**63 to 2**64 - 1")


def random_prompts(model: Any, seed: int) -> list[Tensor]:
    """Random token ids that a model can read."""
    count, length = RANDOM_PROMPTS
    generator = torch.Generator().manual_seed(seed)
    shape = count, min(length, _positions(model))
    return [torch.randint(vocabulary(model), shape, generator=generator)]


def _positions(model: Any) -> int:
    """How many tokens a prompt may have, for all that the configuration says."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else RANDOM_PROMPTS[1]


def vocabulary(model: Any) -> int:
    """How many tokens a model knows."""
    return int(model.config.get_text_config().vocab_size)


def check_vocabularies(original: Any, rotated: Any) -> None:
    """Refuse models that read different tokens."""
    if vocabulary(original) != vocabulary(rotated):
        raise RotationError(
            f"the original has a vocabulary of {vocabulary(original)}, the rotated model of "
            f"{vocabulary(rotated)}: these are two models"
        )


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of every prompt, on the CPU.

    Without a padding token a classifier reads one sequence at a time.

    Raises:
        RotationError: a prompt has a token or a length that the model does not know.
    """
    device = next(model.parameters()).device

    def read(ids: Tensor) -> Tensor:
        rows = (ids,) if model.can_generate() else ids.split(1)
        return torch.cat([model(row.to(device), use_cache=False).logits.cpu() for row in rows])

    try:
        return [read(ids) for ids in prompts]
    except IndexError as error:
        longest, largest = max(ids.shape[-1] for ids in prompts), max(int(i.max()) for i in prompts)
        raise RotationError(
            f"a {type(model).__name__} of {vocabulary(model)} tokens and {_positions(model)} "
            f"positions can't read prompts with token {largest} and of length {longest} ({error})"
        ) from error
