"""Whether the numbers allow it: finite in, finite out, decided before the first write."""

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.edits import Plan, Rotate, WeightEdit
from fastrot.errors import RotationError
from fastrot.fuse import rotated, scale_of
from fastrot.index import Index
from fastrot.mapping import STREAM
from fastrot.scalars import numbers

SAMPLE = 4096
"""Vectors whose channels are looked at for the dynamic range."""

NARROW = (torch.bfloat16, torch.float16)


class ValueRangeError(RotationError):
    """A weight that is not finite, or would not be a number of its dtype once rotated."""


class PrecisionWarning(UserWarning):
    """A rotation that is exact, but rounds more coarsely than the model does by itself."""


def check_values(model: nn.Module | Index, plan: Plan) -> None:
    """Refuse weights of which a rotation would make infinities, or nothing but rounding error.

    No entry of a rotated vector is larger than the vector's norm, so that the norm of the whole
    weight times its largest scale is a bound. Only where this bound is too large is the weight
    rotated on trial.

    Args:
        model: the model the plan was made for, its weights in memory.
        plan: what will be done.

    Raises:
        ValueRangeError: names the weight, the figure and the way out.
    """
    parameters = Index.of(model).parameters
    with torch.no_grad():
        weights = [parameters[edit.parameter].detach() for edit in plan.weights]
        scales = {
            step: scale_of(parameters.__getitem__, step)
            for step in dict.fromkeys(chain(*(edit.scales for edit in plan.weights)))
        }
        norms = numbers(map(torch.linalg.vector_norm, weights))
        largest = dict(zip(scales, numbers(s.abs().max() for s in scales.values()), strict=True))
        for edit, weight, norm in zip(plan.weights, weights, norms, strict=True):
            bound = 1.01 * norm * math.prod(largest[step] for step in edit.scales)
            if not bound < torch.finfo(weight.dtype).max:
                for values in (*(scales[step] for step in edit.scales), weight):
                    _check_finite(edit.parameter, values)
                _check_on_trial(model, edit, weight)
            if weight.dtype == torch.float16 and weight.dim() > 1 and edit.scales:
                check_not_lost(edit, weight, [scales[step] for step in edit.scales])


def dynamic_range(model: nn.Module | Index, plan: Plan) -> float:
    """How far the residual stream's largest channels stand out of the others, at least 1.

    The largest of the root mean square of the channels over their median, of the embedding and of
    every weight that writes into the stream. After R1 all channels are rounded as coarsely as the
    root mean square: this is about the factor by which a 16-bit model's error may grow.
    """
    if not any(STREAM in edit.groups for edit in plan.weights):
        return 1.0
    figures = numbers(
        figure
        for channels in _writers(Index.of(model), plan)
        for figure in (channels.median(), channels.square().mean().sqrt())
    )
    pairs = zip(figures[::2], figures[1::2], strict=True)
    return max([1.0, *(mean / median for median, mean in pairs if median > 0)])


def notes(index: Index, plan: Plan) -> tuple[str, ...]:
    """What the weights predict about precision, for the plan's table; empty if nothing is odd."""
    narrow = [p for p in plan.parameters if index.parameters[p].dtype in NARROW]
    ratio = dynamic_range(index, plan) if narrow else 1.0
    if ratio < 2:
        return ()
    dtype = str(index.parameters[narrow[0]].dtype).removeprefix("torch.")
    return (
        f"a few channels of the residual stream are massive (root mean square {ratio:.1f} times "
        f"the median): with R1 the rounding error of {dtype} may grow as much. Compare by "
        "`fastrot verify`; float32, or rotations without R1, do not have it",
    )


def _surely_finite(values: Tensor) -> bool:
    """By one pass: a sum of finite numbers is seldom infinite, and one with others never finite."""
    return bool(values.sum().isfinite())


def _check_finite(name: str, values: Tensor) -> None:
    bad = ~values.isfinite()
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueRangeError(
            f"{name} holds {int(bad.sum())} values that are not finite ({float(values[place])} at "
            f"{place}), which a rotation would spread over whole rows; repair or reload it"
        )


def _check_on_trial(model: nn.Module | Index, edit: WeightEdit, weight: Tensor) -> None:
    most = float(rotated(model, edit).abs().max())
    limit = torch.finfo(weight.dtype).max
    if not most <= limit:
        wider = "bfloat16 or float32" if weight.dtype == torch.float16 else "a wider dtype"
        raise ValueRangeError(
            f"{edit.parameter} would hold {most:.3g} once rotated, more than "
            f"{str(weight.dtype).removeprefix('torch.')} can ({limit:.3g}); load the model in "
            f"{wider}, or leave {' and '.join(edit.groups)} out"
        )


def check_converted(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse a conversion to another dtype that makes infinities of numbers.

    Raises:
        ValueRangeError: names the tensor and the way out.
    """
    if not after.is_floating_point() or _surely_finite(after):
        return
    lost = before.isfinite() & ~after.isfinite()
    if lost.any():
        most, limit = float(before[lost].double().abs().max()), torch.finfo(after.dtype).max
        raise ValueRangeError(
            f"{name} holds {most:.3g}, more than {str(after.dtype).removeprefix('torch.')} can "
            f"({limit:.3g}); choose a wider dtype, such as bfloat16"
        )


def check_rotated(edit: WeightEdit, weight: Tensor) -> None:
    """Refuse what became of a weight, or of a part of it, if it is not finite.

    Raises:
        ValueRangeError: names the weight and the way out.
    """
    if _surely_finite(weight):
        return
    bad = sum(int((~part.isfinite()).sum()) for part in weight.split(1024))
    if bad:
        raise ValueRangeError(
            f"{edit.parameter} holds values that are not finite, or too large for "
            f"{str(weight.dtype).removeprefix('torch.')} once rotated ({bad} of {weight.numel()}); "
            f"repair it, take a wider dtype, or leave {' and '.join(edit.groups)} out"
        )


def check_not_lost(edit: WeightEdit, weight: Tensor, scales: list[Tensor]) -> None:
    """float16 has fixed steps of 6e-8 below 6e-5: a folded norm may push a weight there."""
    steps = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    count = weight.numel() ** 0.5
    before = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / count
    after = before * min(float(scale.square().mean().sqrt()) for scale in scales)
    off = steps / 12**0.5 / after if after else 0.0
    if off > 1e-3 and after < before / 4:
        raise ValueRangeError(
            f"{edit.parameter} with its norm's weight folded in would hold values of about "
            f"{after:.1g}, which float16 rounds by {off:.1%}; load the model in bfloat16 or "
            f"float32, or leave {' and '.join(edit.groups)} out"
        )


def _writers(index: Index, plan: Plan) -> Iterator[Tensor]:
    """The root mean square of every channel, of all that writes into the stream."""
    # transformers finds no embedding by itself where names or classes are the user's.
    with suppress(AttributeError, NotImplementedError):
        embedding: Any = index.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        vectors = embedding[:: max(1, len(embedding) // SAMPLE)]
        yield torch.linalg.vector_norm(vectors.float(), dim=0) / len(vectors) ** 0.5
    for edit in plan.weights:
        weight = index.parameters[edit.parameter].detach()
        if weight.dim() != 2:
            continue
        written = any(
            isinstance(s, Rotate) and s.group == STREAM and s.dim == 0 for s in edit.steps
        )
        if written:
            vectors = weight[:, :: max(1, weight.shape[1] // SAMPLE)]
            yield torch.linalg.vector_norm(vectors.float(), dim=1) / vectors.shape[1] ** 0.5
