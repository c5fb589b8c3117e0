"""Windows of text for the commands that measure and learn."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastrot.lab.corpus import cut, found_text, read_texts, tokenize
from fastrot.learning.windows import check_ids

CONTEXT = 512


def windows_of(folder: Path, files: Sequence[Path], tokens: int, least: int) -> Tensor:
    """Windows for the model in a folder, from files, or from text that comes with Python.

    Args:
        folder: a checkpoint with a tokenizer.
        files: of text.
        tokens: to predict.
        least: windows that there must be.

    Returns:
        Token ids, ``(n, length + 1)``, in all no longer than the model reads at a time.

    Raises:
        RotationError: too little text, or a tokenizer with ids that the model does not know.
        OSError: a file can't be read.
    """
    from fastrot.checkpoint.source import configuration
    from fastrot.cli.checkpoint import load_tokenizer

    config = configuration(folder).get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or CONTEXT + 1
    text = read_texts(files) if files else found_text()
    stream = tokenize(text, load_tokenizer(folder))
    check_ids(stream, config.vocab_size, f"the text by the tokenizer of {folder}")
    return spread(stream, tokens, longest - 1, least)


def spread(stream: Tensor, tokens: int, longest: int, least: int) -> Tensor:
    """Windows that predict 512 tokens, or ``longest``, or fewer, so that there are enough."""
    return cut(stream, max(1, min(CONTEXT, longest, tokens // least)), tokens, least=least)
