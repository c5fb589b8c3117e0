"""Token ids in windows: to learn from, and to judge by."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError

SHORTEST = 3
"""Tokens of a window, at least."""
JUDGES = 8
"""Windows that are held out, at least: the standard error of fewer is hardly known."""
HELD_OUT = 4
"""Of so many windows one is held out, if there are enough."""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def windows_in(batches: Any, vocabulary: int, longest: int | None, what: str) -> Tensor:
    """Token ids, ``(n, length)`` int64, of whatever :func:`fastrot.learn` takes.

    Args:
        batches: ids ``(length,)`` or ``(n, length)``, something with such ``input_ids``, or an
            iterable of these.
        vocabulary: how many ids the model knows.
        longest: how many tokens it can read at a time; None if that has no end.
        what: the name of the argument, for errors.

    Raises:
        TypeError: something else than token ids.
        RotationError: none, too short or too long, of several lengths, beyond the vocabulary, or
            with padding.
    """
    single = isinstance(batches, (Tensor, Mapping)) or not hasattr(batches, "__iter__")
    parts = [_ids(part, what) for part in ([batches] if single else batches)]
    if len({part.shape[1] for part in parts}) > 1:
        raise RotationError(f"{what} has windows of several lengths; cut them to one")
    if not any(map(len, parts)) or parts[0].shape[1] < SHORTEST:
        raise RotationError(
            f"{what} is empty, or its windows are shorter than {SHORTEST} tokens; give token ids "
            "(n, length)"
        )
    if longest is not None and parts[0].shape[1] > longest:
        raise RotationError(
            f"{what} has windows of {parts[0].shape[1]} tokens, and the model has {longest} "
            "positions; cut them shorter"
        )
    ids = torch.cat(parts).long().cpu()
    check_ids(ids, vocabulary, what)
    return ids


def parted(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to learn from, and those held out: a quarter, or eight, spread over all.

    Raises:
        RotationError: fewer than twice eight.
    """
    count = len(windows)
    if count < 2 * JUDGES:
        raise RotationError(
            f"{count} windows are too few to hold out {JUDGES} and learn from the others: give "
            f"{2 * JUDGES} or more in batches, or {JUDGES} in heldout"
        )
    wanted = max(JUDGES, count // HELD_OUT)
    inside = torch.zeros(count, dtype=torch.bool)
    inside[torch.arange(1, wanted + 1) * count // wanted - 1] = True
    return windows[~inside], windows[inside]


def check_judges(windows: Tensor, judges: Tensor) -> None:
    """Refuse held-out windows that can't judge what was learned from others.

    Raises:
        RotationError: they are too few, or one is there twice or among those to learn from.
    """
    if len(judges) < JUDGES:
        raise RotationError(
            f"{len(judges)} windows in heldout are too few to judge by; give {JUDGES} or more"
        )
    known = {window.numpy().tobytes() for window in windows}
    earlier: dict[bytes, int] = {}
    for number, judge in enumerate(judges):
        seen = judge.numpy().tobytes()
        shown = f"held-out window {number} ({', '.join(map(str, judge[:4].tolist()))}, …)"
        if seen in known:
            raise RotationError(
                f"{shown} is also learned from, and so can't judge; hold out other text, and give "
                "no window twice"
            )
        if seen in earlier:
            raise RotationError(
                f"{shown} is also window {earlier[seen]}, and so one text would judge twice; give "
                "no window twice"
            )
        earlier[seen] = number


def check_ids(ids: Tensor, vocabulary: int, what: str) -> None:
    """Refuse token ids that a model does not know.

    Raises:
        RotationError: names the first of them.
    """
    unknown = ids[(ids < 0) | (ids >= vocabulary)]
    if len(unknown):
        raise RotationError(
            f"{what} has the token id {int(unknown[0])}, and the model's vocabulary has the ids 0 "
            f"to {vocabulary - 1}; take the tokenizer of this model"
        )


def _ids(part: Any, what: str) -> Tensor:
    """One part, ``(n, length)``."""
    if isinstance(part, Mapping):
        if "input_ids" not in part:
            names = ", ".join(map(str, part)) or "nothing"
            raise RotationError(f"{what} has a dict of {names}; it must have input_ids")
        _check_whole(part.get("attention_mask"), what)
        part = part["input_ids"]
    if not isinstance(part, Tensor) or part.dtype not in INTEGERS or part.dim() not in (1, 2):
        shown = type(part).__name__
        if isinstance(part, Tensor):
            shown = f"{tuple(part.shape)} of {str(part.dtype).removeprefix('torch.')}"
        raise TypeError(
            f"{what} must hold token ids, tensors (length,) or (n, length), got {shown}"
        )
    return torch.atleast_2d(part)


def _check_whole(mask: Any, what: str) -> None:
    """Refuse a mask of a tokenizer that leaves out some tokens.

    Raises:
        RotationError: says how to do without.
    """
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise RotationError(
            f"{what} has an attention_mask with zeros, and padding can't be learned from; join the "
            "text and cut it into windows of one length, without padding"
        )
