"""How well a model predicts a text, and whether a difference between two is more than chance."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastrot.errors import RotationError
from fastrot.verification import vocabulary

BATCH = 8
LOGITS = 2**26
"""Of a batch, at most: a quarter of a gigabyte in float32."""


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of next-token prediction.

    Attributes:
        windows: the mean of each window in nats, float64; every window starts without context.
    """

    windows: Tensor

    @property
    def mean(self) -> float:
        """Over all tokens, in nats."""
        return float(self.windows.mean())

    @property
    def perplexity(self) -> float:
        """Per token; infinite beyond the range of a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


@dataclass(frozen=True)
class Difference:
    """Mean of one model's losses minus another's, in nats, and the standard error of that."""

    mean: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return abs(self.mean) > 2 * self.error


def compare(losses: Losses, others: Losses) -> Difference:
    """The paired difference of two models on the same windows.

    Pairs leave out what makes one window harder than another for both models.

    Raises:
        RotationError: other windows, or only one, which has no spread.
    """
    if losses.windows.shape != others.windows.shape:
        raise RotationError(
            f"{len(losses.windows)} and {len(others.windows)} windows: compare on the same text"
        )
    count = len(losses.windows)
    if count < 2:
        raise RotationError("a standard error needs two windows or more; take more tokens")
    pairs = losses.windows - others.windows
    return Difference(float(pairs.mean()), float(pairs.std()) / count**0.5)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a model that predicts no tokens.

    A model that names no head is asked for its logits, of two tokens.

    Raises:
        RotationError: it has no language-model head.
    """
    if model.get_output_embeddings() is not None:
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if logits is None or logits.shape != (1, 2, vocabulary(model)):
        raise RotationError(
            f"{type(model).__name__} has no language-model head; pass the causal language model"
        )


@torch.no_grad()
def evaluate(model: Any, windows: Tensor, done: Callable[[int], Any] | None = None) -> Losses:
    """The losses of a model on every window.

    Args:
        model: a causal language model as it is: quantized, rotated, or not.
        windows: token ids, ``(n, context + 1)``.
        done: told how many tokens were predicted after each batch.
    """
    context = windows.shape[1] - 1
    losses = []
    for batch in windows.split(min(BATCH, max(1, LOGITS // (context * vocabulary(model))))):
        batch = batch.to(model.device)
        ids, targets = batch[:, :-1], batch[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape).double().mean(-1).cpu())
        if done is not None:
            done(targets.numel())
    return Losses(torch.cat(losses))
