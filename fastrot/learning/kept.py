"""What a long run has found so far, in a file from which the same run goes on."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError


class Kept:
    """Named sets of tensors, written whenever one is put.

    Args:
        path: the file; None keeps nothing.
        run: what tells this run from others.

    Raises:
        RotationError: the file is of another run, or none of these.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self._path, self._run = path, run
        self._sets: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self._sets = self._read(path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                run = (file.metadata() or {}).get("run")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise RotationError(f"{path} was not kept by a run: {error}; remove it") from None
        if run != self._run:
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
        self._sets |= {f"{name}/{n}": t.detach().clone() for n, t in tensors.items()}
        if self._path is None:
            return
        from safetensors.torch import save_file

        fresh = self._path.with_name(f"{self._path.name}.new")
        save_file(self._sets, str(fresh), {"run": self._run})
        os.replace(fresh, self._path)

    def close(self) -> None:
        """Remove the file: the run has ended."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def run_of(model: Any, *others: Any) -> str:
    """A digest of a model, to the sums of its weights, and of whatever else decides a run."""
    found = hashlib.sha256()
    for other in others:
        found.update(other.numpy().tobytes() if isinstance(other, Tensor) else repr(other).encode())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            found.update(f"{name}{tuple(weight.shape)}{float(weight.double().sum())}".encode())
    return found.hexdigest()
