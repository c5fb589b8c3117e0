"""Checkpoints that are loaded as a whole or not at all; whatever they hold, an error names it."""

from pathlib import Path
from typing import Any

from fastrot.checkpoint.source import naming, outline, weight_files
from fastrot.errors import RotationError

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def size(folder: Path) -> int:
    """Bytes that the weights of a checkpoint take."""
    return sum(file.stat().st_size for file in weight_files(folder))


def load(folder: Path, dtype: str = "auto") -> Any:
    """Load a causal language model, with online rotations, in evaluation mode.

    Args:
        folder: a checkpoint of transformers.
        dtype: name of the dtype of the weights; ``auto`` leaves them as they are.

    Raises:
        FileNotFoundError: there is no checkpoint.
        RotationError: it is damaged, or its weights are not exactly those of the model.
    """
    from fastrot.integrations.outlines import auto_class

    shapes = outline(folder)
    described, stored = sum(weight.numel() for weight in shapes.parameters()), size(folder)
    # Otherwise transformers would make up what is missing, however large.
    if stored and described > 8 * stored:
        raise RotationError(
            f"{folder} lacks weights: config.json describes {described:,} numbers, and all weights "
            f"together have {stored:,} bytes"
        )
    with naming(f"{folder} can't be read"):
        loaded: Any = auto_class(shapes.config).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    # transformers invents what does not fit, drops what it does not know, and only warns of it.
    problems = {
        "lacks": info["missing_keys"],
        "has unknown": info["unexpected_keys"],
        "has wrongly shaped": {name for name, *_ in info["mismatched_keys"]},
    }
    for problem, keys in problems.items():
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
            raise RotationError(
                f"{folder} {problem} weights for a {type(model).__name__}: {some} ({len(keys)})"
            )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        RotationError: it is damaged.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder} has no tokenizer to read text with")
    with naming(f"{folder} can't be read"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
