"""Checkpoints on disk: read as a whole or not at all, written as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPANIONS = (
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
)
"""What belongs to a checkpoint besides weights and configurations; those are written anew."""

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def outline(folder: Path) -> Any:
    """The model of a checkpoint on the meta device: shapes without weights.

    Raises:
        FileNotFoundError: there is no config.json.
    """
    import torch
    from transformers import AutoConfig

    _check_folder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return _auto_class(config).from_config(config)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a transformers model: no config.json"
        )


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from fastrot.mapping import SHELLS

    return AutoModelForImageTextToText if config.model_type in SHELLS else AutoModelForCausalLM


def load(folder: Path, dtype: str = "auto") -> Any:
    """Load a causal language model, with online rotations, in evaluation mode.

    Args:
        folder: a checkpoint of transformers.
        dtype: name of the dtype of the weights; ``auto`` leaves them as they are.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its weights are not exactly those of the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    _check_folder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} can't be read: {error}") from error
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
            raise ValueError(
                f"{folder} {problem} weights for a {type(model).__name__}: {some} ({len(keys)})"
            )
    return model.eval()


def check_target(source: Path, target: Path) -> None:
    """Refuse a folder that a checkpoint can't be written to without a loss.

    Raises:
        ValueError: it is the source.
        OSError: it is taken, or where it should lie is no folder.
    """
    if target == source:
        raise ValueError(f"DST is SRC ({source}); give the rotated model a folder of its own")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty, and nothing is overwritten")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}, where {target.name} should lie, is not a folder")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its name if all goes well, and goes if not."""
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor, chat templates and licence, if there are any."""
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder} has no tokenizer to read the given prompts with")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
