"""The folder of a checkpoint: its configuration and its files; an error names what is wrong."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrot.errors import RotationError

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
    data = read_json(file)
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
    with naming(f"{file} can't be read"):
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object of settings in a file."""
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
def naming(problem: str) -> Iterator[None]:
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
    with naming(f"{folder}/config.json can't be read"):
        return model_of(config)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a checkpoint from.

    Raises:
        RotationError: an index that is damaged, or that points out of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return [folder / part for part in sorted(set(_places(folder, name).values()))]
    return []


def indexed(folder: Path) -> set[str]:
    """The tensors that the index of a checkpoint in safetensors names; none without an index.

    Raises:
        RotationError: an index that is damaged, or that points out of the folder.
    """
    name = "model.safetensors"
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() or not index.is_file():
        return set()
    return set(_places(folder, name))


def _places(folder: Path, name: str) -> dict[str, str]:
    index = folder / f"{name}.index.json"
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise RotationError(f"{index} has no weight_map from names of weights to names of files")
    for weight, part in places.items():
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise RotationError(
                f"{index}: weight_map says that {weight} lies in {part!r}, outside of the folder"
            )
    return places
