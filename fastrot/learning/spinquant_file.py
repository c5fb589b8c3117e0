"""Matrices that SpinQuant's own training wrote: its ``R.bin``.

A dict saved by torch: ``R1``, and ``model.layers.N.self_attn.R2`` for every layer, which turn the
residual stream and the values of a head as here: ``x → x R``. Training leaves them orthogonal to
some digits only, so the nearest orthogonal matrices are taken.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from fastrot.errors import RotationError
from fastrot.learning.orthogonal import defect

FARTHEST = 0.05
"""Largest entry of ``|RᵀR - I|`` that is still believed to be an error of rounding."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.R2$")


def read_spinquant(path: str | Path) -> dict[str, Tensor | list[Tensor]]:
    """The matrices of a file, for ``fastrot.Recipe(matrices=...)``.

    Args:
        path: of the file, which is read without running code from it.

    Returns:
        ``R1``, ``(hidden, hidden)``, and for ``R2`` a list with one for each layer,
        ``(head, head)``, as far as the file has them; float64.

    Raises:
        RotationError: another kind of file, or a damaged one; a layer that is missing; or a matrix
            that is not nearly orthogonal, empty, sparse, or without numbers (meta).
        OSError: it can't be opened.
    """
    with Path(path).open("rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make torch's reader raise whatever there is
            reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__  # then advice
            raise RotationError(
                f"{path} is no file of matrices that torch saved: {reason}"
            ) from None
    if not isinstance(found, dict):
        raise RotationError(f"{path} holds a {type(found).__name__}, not a dict of matrices")
    layers: dict[int, Tensor] = {}
    matrices: dict[str, Tensor | list[Tensor]] = {}
    for name, value in found.items():
        match = _LAYER.search(str(name))
        if name == "R1":
            matrices["R1"] = _nearest(value, f"{path}: {name}")
        elif match:
            layers[int(match[1])] = _nearest(value, f"{path}: {name}")
        else:
            raise RotationError(f"{path}: {name!r} is neither R1 nor the R2 of a layer")
    if sorted(layers) != list(range(len(layers))):
        raise RotationError(f"{path} has R2 of layers {sorted(layers)}, which leaves some out")
    if layers:
        matrices["R2"] = [layers[number] for number in range(len(layers))]
    if not matrices:
        raise RotationError(f"{path} has no matrices")
    return matrices


def _nearest(value: object, what: str) -> Tensor:
    """The orthogonal factor of the polar decomposition, float64."""
    if not isinstance(value, Tensor):
        raise RotationError(f"{what} is no matrix but a {type(value).__name__}")
    square = value.dim() == 2 and value.shape[0] == value.shape[1] > 0
    dense = value.layout == torch.strided and value.device.type == "cpu"
    if not (square and dense and value.is_floating_point()):
        kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
        raise RotationError(
            f"{what} is no square, dense matrix of numbers, but {tuple(value.shape)}, {kind}"
        )
    matrix = value.detach().double()
    far = defect(matrix)
    if not far <= FARTHEST:
        raise RotationError(f"{what} is not orthogonal: |RᵀR - I| has an entry of {far:.2g}")
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest
