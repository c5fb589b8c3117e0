"""Text to measure on: files that are given, or what every Python brings along; cut into windows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError


def read_texts(files: Iterable[Path]) -> str:
    """The text of files, one after the other.

    Raises:
        OSError: one can't be read.
        RotationError: one is no text in UTF-8.
    """
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise RotationError(f"{file} is no text in UTF-8: {error}") from None
    return "\n\n".join(texts)


def found_text() -> str:
    """English that is on this machine: the reference of the running Python, about 700 kB.

    Raises:
        FileNotFoundError: this Python lacks it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "this Python has no pydoc_data.topics to take text from; give files of your own"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """The token ids of a text, ``(length,)`` int64, without special ones."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def cut(stream: Tensor, context: int, tokens: int, least: int = 1) -> Tensor:
    """Windows of a stream, spread evenly over all of it.

    Args:
        stream: token ids, ``(length,)``.
        context: tokens that are predicted in each window.
        tokens: how many are wanted in all; at least one window is taken.
        least: windows that there must be.

    Returns:
        ``(n, context + 1)``: each window ends with the token after it.

    Raises:
        RotationError: the stream is shorter.
    """
    if len(stream) < least * context + 1:
        raise RotationError(
            f"the text has {len(stream)} tokens, and {least} windows of {context} need "
            f"{least * context + 1}; give more text, or a smaller context"
        )
    windows = stream.unfold(0, context + 1, context)
    wanted = min(len(windows), max(least, tokens // context))
    return windows[torch.arange(wanted) * len(windows) // wanted]
