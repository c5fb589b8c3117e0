"""What a long run has found so far, in a file from which the same run goes on."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError


class Kept:
    """Named sets of tensors, written whenever one is put; there is no file before.

    Args:
        path: the file; None keeps nothing.
        run: what tells this run from others.

    Raises:
        RotationError: the file is of another run, or none of these.
        OSError: it can't be written.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self._path, self._run = path, run
        self._sets: dict[str, Tensor] = {}
        if path is None:
            return
        if path.is_dir():
            raise RotationError(f"{path} is a folder; name a file to keep the run in")
        if path.exists():
            self._sets = self._read(path)
        with beside(path) as fresh:  # what can't be written is known before hours are spent
            fresh.touch()

    def _read(self, path: Path) -> dict[str, Tensor]:
        from safetensors import SafetensorError

        try:
            metadata, tensors = read(path)
        except SafetensorError as error:
            raise RotationError(f"{path} was not kept by a run: {error}; remove it") from None
        if metadata.get("run") != self._run:
            raise RotationError(
                f"{path} was kept by a run with another model, text, recipe or option; repeat that "
                "run, or remove the file"
            )
        return tensors

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a set, by their own names; None if it was not put yet."""
        start = f"{name}/"
        found = {n.removeprefix(start): t for n, t in self._sets.items() if n.startswith(start)}
        return found or None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a set, in the place of an older one of this name."""
        if self._path is None:
            return
        self._sets |= {f"{name}/{n}": t.detach().clone() for n, t in tensors.items()}
        from safetensors.torch import save

        with beside(self._path) as fresh:
            fresh.write_bytes(save(self._sets, {"run": self._run}))
            os.replace(fresh, self._path)


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file.

    Raises:
        SafetensorError: another format, or a damaged file.
        OSError: it can't be read.
    """
    from safetensors import safe_open

    path.open("rb").close()  # safetensors calls a file missing that can't be read
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata() or {}, tensors


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name for what is to become a file; nothing of that name is left, and errors name the file.

    Raises:
        OSError: as inside.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        try:
            yield fresh
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def run_of(model: Any, *others: Any) -> str:
    """A digest of a model, its configuration and weights, and of whatever else decides a run."""
    found = hashlib.sha256(model.config.to_json_string().encode())
    tensors = dict(model.state_dict())
    for name, other in [*tensors.items(), *enumerate(others)]:
        if not isinstance(other, Tensor):
            found.update(repr(other).encode())
            continue
        found.update(f"{name}{tuple(other.shape)}{other.dtype}".encode())
        numbers = other.detach().cpu().contiguous().flatten()
        found.update(numbers.view(torch.uint8).numpy().data)
    return found.hexdigest()
