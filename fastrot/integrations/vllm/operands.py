"""Matrices of online rotations that no seed makes, read from the checkpoint itself.

vLLM's loaders know parameters only, so they get to see no operand.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from fastrot.edits import OnlineSite
from fastrot.errors import RecordError, RotationError
from fastrot.rotations import MATRIX, Rotation

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OPERAND = re.compile(r"\.fastrot_\w+\.operand$")
"""Names of the tensors that hold the matrices of online rotations."""


def with_matrices(sites: Iterable[OnlineSite], checkpoint: str) -> list[OnlineSite]:
    """The sites, those with a dense matrix with that of the checkpoint.

    A random matrix could be made again, but its last digits depend on the machine.

    Args:
        sites: the online rotations that the record asks for.
        checkpoint: a folder; the name of a repository will do where no matrix is dense.

    Raises:
        RotationError: a matrix has to be read, and the checkpoint is no folder.
        RecordError: a matrix is missing, or not the recorded one.
    """
    found: dict[str, Rotation] = {}
    return [_filled(site, Path(checkpoint), found) for site in sites]


def _filled(site: OnlineSite, folder: Path, found: dict[str, Rotation]) -> OnlineSite:
    rotation = site.rotation
    if not rotation.dense:
        return site
    if not folder.is_dir():
        raise RotationError(
            f"{site.group} of {site.module} is a {rotation.kind}, which is read from the "
            f"checkpoint, and {str(folder)!r} is no folder; download the checkpoint and serve that"
        )
    name, tensor = _read(site, folder)
    if tensor.dtype != torch.int64 or tensor.shape != (rotation.block, rotation.block):
        raise RecordError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not the bits of a float64 matrix of "
            f"order {rotation.block}; take the checkpoint as it was written"
        )
    # Equal matrices are one: all sites of a rank share it, and it is sent to the rank once.
    matrix = Rotation.from_matrix(tensor.view(torch.float64))
    matrix = found.setdefault(matrix.label, matrix)
    if rotation.kind == MATRIX and matrix.label != rotation.label:
        raise RecordError(
            f"{name} is not the matrix that the record names; take the checkpoint as it was written"
        )
    filled = replace(matrix, size=rotation.size, block_size=rotation.block)
    return replace(site, rotation=filled)


def _read(site: OnlineSite, folder: Path) -> tuple[str, torch.Tensor]:
    """The operand of a site in a checkpoint, and its name there."""
    from safetensors import safe_open

    owner, _, child = site.module.rpartition(".")
    # On the module itself, or on the block around it.
    names = (
        f"{site.module}.fastrot_{site.location}.operand",
        f"{owner}.fastrot_{child}_{site.location}.operand",
    )
    index = folder / INDEX
    files = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for name in names:
        path = folder / files.get(name, SINGLE)
        if not path.exists():
            continue
        with safe_open(path, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return name, tensors.get_tensor(name)
    raise RecordError(
        f"the checkpoint {str(folder)!r} has no {names[-1]}, which its record asks for; take the "
        "checkpoint as it was written"
    )
