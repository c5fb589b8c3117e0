"""Checkpoints on disk, read as a whole or not at all; whatever they hold, an error names it."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrot.errors import RotationError

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
MOST = {"layer": 2**10, "depth": 2**10, "num_labels": 2**20}
"""What no model comes near, and would take long to build even without weights."""


def configuration(folder: Path) -> Any:
    """The configuration of a checkpoint.

    Raises:
        FileNotFoundError: there is no config.json.
        RotationError: it is none of a model that transformers has.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a transformers model: no config.json"
        )
    data = _json(file)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        way = "a newer one may know it"
        if "auto_map" in data:
            way = (
                "its own code (auto_map) is not run on the command line: load it in Python with "
                "trust_remote_code=True, then call fastrot.apply"
            )
        raise RotationError(
            f"{file}: transformers {transformers.__version__} has no model_type {model_type!r}; "
            f"{way}"
        )
    _check_counts(file, data)
    with _naming(f"{file} can't be read"):
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RotationError(f"{file} is not a valid JSON file: {error}") from error
    if not isinstance(data, dict):
        raise RotationError(f"{file} holds a {type(data).__name__}, not an object of settings")
    return data


def _check_counts(file: Path, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_counts(file, value)
        for part, most in MOST.items():
            if part in name and isinstance(value, int) and value > most:
                raise RotationError(f"{file}: {name}={value} is beyond any model ({most})")


@contextmanager
def _naming(problem: str) -> Iterator[None]:
    """Whatever transformers and safetensors raise at wrong files, as an error that names them."""
    try:
        yield
    except (RotationError, OSError, MemoryError):
        raise
    except Exception as error:
        raise RotationError(f"{problem}: {type(error).__name__}: {error}") from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without looking for garbage: what modules make stays, and there is a lot of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Now all that there is counts as old, else the next object would start a search.
        gc.freeze()
        gc.unfreeze()
        if enabled:
            gc.enable()


@uncollected()
def outline(folder: Path) -> Any:
    """The model of a checkpoint on the meta device: shapes without weights.

    Raises:
        FileNotFoundError: there is no config.json.
        RotationError: it describes no model.
    """
    from fastrot.integrations.outlines import model_of

    config = configuration(folder)
    with _naming(f"{folder}/config.json can't be read"):
        return model_of(config)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a checkpoint from.

    Raises:
        RotationError: an index that is damaged, or that points out of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / part for part in _parts(index)]
    return []


def _parts(index: Path) -> list[str]:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise RotationError(f"{index} has no weight_map from names of weights to names of files")
    for weight, part in places.items():
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise RotationError(
                f"{index}: weight_map says that {weight} lies in {part!r}, outside of the folder"
            )
    return sorted(set(places.values()))


def size(folder: Path, dtype: str = "auto") -> int:
    """Bytes that the weights of a checkpoint take, or would take in another dtype."""
    import torch

    if dtype == "auto":
        return sum(file.stat().st_size for file in weight_files(folder))
    numbers = sum(weight.numel() for weight in outline(folder).parameters())
    return numbers * int(getattr(torch, dtype).itemsize)


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
    with _naming(f"{folder} can't be read"):
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


def save(model: Any, folder: Path) -> None:
    """Write a model.

    Raises:
        OSError: the disk is full, or fails.
        RotationError: transformers does not write a model with such settings.
    """
    with _naming("the weights can't be written"):
        model.save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        RotationError: it is damaged.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder} has no tokenizer to read the given prompts with")
    with _naming(f"{folder} can't be read"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
