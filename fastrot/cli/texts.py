"""Windows of text for the commands that measure and learn."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastrot.lab.corpus import cut, found_text, read_texts, tokenize

CONTEXT = 512


def windows_of(folder: Path, files: Sequence[Path], tokens: int, least: int) -> Tensor:
    """Windows for the model in a folder, from files, or from text that comes with Python.

    Args:
        folder: a checkpoint with a tokenizer.
        files: of text.
        tokens: to predict.
        least: windows that there must be.

    Returns:
        Token ids, ``(n, length + 1)``.
    """
    from fastrot.checkpoint.source import configuration
    from fastrot.cli.checkpoint import load_tokenizer

    config = configuration(folder).get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or CONTEXT
    text = read_texts(files) if files else found_text()
    return spread(tokenize(text, load_tokenizer(folder)), tokens, longest, least)


def spread(stream: Tensor, tokens: int, longest: int, least: int) -> Tensor:
    """Windows of 512, or shorter, so that there are enough of them."""
    return cut(stream, max(1, min(CONTEXT, longest, tokens // least)), tokens, least=least)
