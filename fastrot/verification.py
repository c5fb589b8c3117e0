"""``fastrot.verify``: do two models compute the same logits?

How far may they differ? In exact arithmetic not at all, and floating point adds about 1e-6 in
float32. But the weights of a rotated model were rounded once, to the dtype they are stored in, and
how much that moves the logits depends on the model. So it is measured: noise of the size of such a
rounding is put on the original's weights. Twice what it does is allowed.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrot.arguments import parse_seed
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
    """Compare the logits of two models on prompts, in eval mode; neither is changed.

    Args:
        original: before the rotation.
        rotated: after it.
        prompts: token ids, a list of tensors ``(batch, length)``; four random ones of 64 tokens
            are added.
        tolerance: greatest relative error; default what arithmetic in ``precision`` makes, or twice
            what rounding the weights to the dtype of ``rotated`` does to ``original``.
        precision: to compute in; a model of another dtype is copied, one at a time.
        seed: of the random prompts.

    Raises:
        RotationError: the vocabularies differ, a prompt does not fit the models, ``tolerance`` is
            negative or no number, or ``seed`` has more than 64 bits.
        TypeError: something that is no model, or no prompt.
    """
    dtype = parse_precision(precision)
    seed = check_seed(seed)
    check_tolerance(tolerance)
    given = parse_prompts(prompts)
    for model in (original, rotated):
        check_model(model)
    check_vocabularies(original, rotated)
    ids = [*random_prompts(rotated, seed), *given]
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


def check_seed(seed: int, name: str = "seed=") -> int:
    """A seed as torch takes it; ``name`` is what stands before its value in errors.

    Raises:
        RotationError: torch has no generator for it.
        TypeError: no whole number.
    """
    whole = parse_seed(seed)
    if whole not in SEEDS:
        raise RotationError(f"{name}{whole}: expected a whole number from -2**63 to 2**64 - 1")
    return whole


def check_tolerance(tolerance: float | None) -> None:
    """Refuse what no error can be compared with.

    Raises:
        RotationError: it is negative or no number.
        TypeError: something else than a number or None.
    """
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(f"tolerance must be a number such as 1e-5, or None, got {tolerance!r}")
    if not tolerance >= 0:
        raise RotationError(f"tolerance={tolerance} is negative or no number; give one from 0 on")


def parse_prompts(prompts: Iterable[Tensor]) -> list[Tensor]:
    """Token ids that were given, as a list.

    Raises:
        RotationError: one is not ``(batch, length)``, or has no token.
        TypeError: something else than token ids.
    """
    wanted = "give a list of tensors (batch, length), int64 or int32"
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must hold token ids, got {prompts!r:.60}; {wanted}")
    given = list(prompts)
    for number, ids in enumerate(given):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            what = ids.dtype if isinstance(ids, Tensor) else f"{ids!r:.60}"
            raise TypeError(f"prompt {number} must hold token ids, got {what}; {wanted}")
        if ids.dim() != 2 or not ids.numel():
            raise RotationError(f"prompt {number} has the shape {tuple(ids.shape)}; {wanted}")
    return given


def random_prompts(model: Any, seed: int) -> list[Tensor]:
    """Random token ids that a model can read."""
    count, length = RANDOM_PROMPTS
    generator = torch.Generator().manual_seed(seed)
    shape = count, min(length, longest(model) or length)
    return [torch.randint(vocabulary(model), shape, generator=generator)]


def longest(model: Any) -> int | None:
    """How many tokens a text may have, if the configuration says so."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def learned_positions(model: Any) -> int | None:
    """How many tokens a model can read at most, where positions are rows of a table; else None."""
    most, tokens = longest(model), model.get_input_embeddings()
    if most is None:
        return None
    # OPT's and BART's have two rows that no position has.
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return most if any(m.num_embeddings - most in (0, 2) for m in tables) else None


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode: dropout would be taken for error, and for what rounding does, which hides error.

    The flag of each module is its own again afterwards.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of every prompt in eval mode, on the CPU.

    Without a padding token a classifier reads one sequence at a time.

    Raises:
        RotationError: a prompt has a token or a length that the model does not know.
    """
    device = next(model.parameters()).device

    def read(ids: Tensor) -> Tensor:
        rows = (ids,) if model.can_generate() else ids.split(1)
        return torch.cat([model(row.to(device), use_cache=False).logits.cpu() for row in rows])

    try:
        with _evaluating(model):
            return [read(ids) for ids in prompts]
    except IndexError as error:
        length, largest = max(ids.shape[-1] for ids in prompts), max(int(i.max()) for i in prompts)
        raise RotationError(
            f"a {type(model).__name__} of {vocabulary(model)} tokens and {longest(model)} "
            f"positions can't read prompts with token {largest} and of length {length} ({error})"
        ) from error
