"""GPTQ: weights rounded one input after the other, the rest made up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, algorithm 1, without reordering of inputs. The second moments of the inputs are
those of the model as it is, for all layers at once.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.lab.quantizers import grid_of
from fastrot.lab.schemes import Numbers

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean."""
BLOCK = 128
"""Inputs whose errors reach the rest of a row together."""
ROOM = 4 << 30
"""Bytes of second moments that are gathered in one pass over the text."""


@torch.no_grad()
def gptq(weight: Tensor, moments: Tensor, numbers: Numbers) -> Tensor:
    """Round a weight so that its products with the inputs change little.

    Args:
        weight: ``(outputs, inputs)``, floating point.
        moments: ``(inputs, inputs)``: the sum of ``x xᵀ`` over inputs ``x``.
        numbers: integers, with a scale for each row or group.

    Returns:
        Members of the grids, shape and dtype of ``weight``.

    Raises:
        RotationError: the inputs do not divide into groups, or moments are not finite.
    """
    w = weight.double() if weight.dtype == torch.float64 else weight.float()
    w = w.clone()
    inputs = w.shape[1]
    size = numbers.group or inputs
    if inputs % size:
        raise RotationError(f"{inputs} elements do not divide into groups of {size}")
    if not moments.isfinite().all():
        raise RotationError(
            "the second moments of its inputs are not finite: NaN or infinity in the weights "
            "before it, or numbers too large to square"
        )
    inverse = _upper_inverse(moments.to(w))
    rounded = torch.empty_like(w)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty_like(w[:, start:stop])
        for column in range(start, stop):
            if column % size == 0:
                group = w[:, column : column + size]
                if column + size > stop:
                    # The last errors have not reached what lies behind this block yet.
                    late = errors[:, : column - start] @ inverse[start:column, stop : column + size]
                    group = torch.cat(
                        [group[:, : stop - column], w[:, stop : column + size] - late], 1
                    )
                grid = grid_of(group, numbers)
            now = w[:, column : column + 1]
            nearest = grid.nearest(now)
            rounded[:, column : column + 1] = nearest
            error = (now - nearest) / inverse[column, column]
            errors[:, column - start : column - start + 1] = error
            w[:, column + 1 : stop] -= error @ inverse[column : column + 1, column + 1 : stop]
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return rounded.to(weight.dtype)


def _upper_inverse(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped second moments."""
    diagonal = moments.diagonal()
    damped = moments + torch.diag_embed(
        (diagonal.mean() * DAMPING).clamp_min(1e-8).expand_as(diagonal)
    )
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


@torch.no_grad()
def calibrated(
    model: Any, linears: Mapping[str, nn.Module], windows: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The second moments of what goes into linear modules, ``(inputs, inputs)`` float32, by name.

    Args:
        model: runs on every window once, or more often if the moments need more than :data:`ROOM`.
        linears: by name.
        windows: token ids, ``(n, length)``.
    """
    left = list(linears)
    while left:
        taken, room = [left.pop(0)], ROOM
        while left and (room := room - _bytes(linears[taken[-1]])) >= _bytes(linears[left[0]]):
            taken.append(left.pop(0))
        moments: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in taken:
                hook = _gathering(moments, name)
                stack.callback(linears[name].register_forward_pre_hook(hook).remove)
            for window in windows.split(1):
                model(input_ids=window.to(model.device), use_cache=False)
        for name in taken:
            if name not in moments:
                raise RotationError(
                    f"{name} saw nothing of the text to calibrate on; leave gptq out"
                )
            yield name, moments.pop(name)


def inputs_of(module: Any) -> int:
    """How many inputs a linear module has."""
    return int(module.weight.shape[1 if isinstance(module, nn.Linear) else 0])


def _bytes(module: Any) -> int:
    return 4 * inputs_of(module) ** 2


def _gathering(moments: dict[str, Tensor], name: str) -> Any:
    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        moments[name] = moments[name].addmm_(x.T, x) if name in moments else x.T @ x

    return gather
