"""Whether a norm is what its mapping says: its parameters, and what it computes."""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.checks import check_parameter
from fastrot.edits import FoldedNorm
from fastrot.errors import RotationError
from fastrot.mapping import NormKind
from fastrot.scalars import numbers

LARGEST_QUOTIENT = {torch.float64: 1e3, torch.float32: 30.0}
"""Root mean square of bias over weight; rounding errors grow as much. For 16 bits it is 10."""


def check_norm_form(
    name: str, module: nn.Module | nn.Parameter, kind: NormKind, width: int
) -> None:
    """Refuse a norm whose parameters are not those of its kind.

    Args:
        name: of the module, or of a bare vector.
        module: the norm, or the vector.
        kind: ``rms``, ``layer``, or ``scale`` for a bare vector.
        width: size of its input.
    """
    if isinstance(module, nn.Parameter) or kind == "scale":
        shape = tuple(module.shape) if isinstance(module, nn.Parameter) else type(module).__name__
        if shape != (width,) or kind != "scale":
            raise RotationError(
                f"{name} ({shape}) is no bare vector of size {width} of kind='scale'; correct "
                "NormMapping.norm or kind"
            )
        return
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    plain = isinstance(weight, nn.Parameter) and weight.shape == (width,)
    if (weight is not None and not plain) or any(m is not module for m in module.modules()):
        raise RotationError(
            f"{name} ({type(module).__name__}) is no norm with a parameter 'weight' of size "
            f"{width}, or none at all; correct NormMapping.norm"
        )
    if bias is not None and (kind == "rms" or weight is None):
        raise RotationError(
            f"{name} ({type(module).__name__}) has a bias, so it is no RMSNorm; say kind='layer' "
            "in its NormMapping if it centres, or leave R1 out for this model"
        )


def check_norms(norms: Iterable[tuple[FoldedNorm, nn.Module]]) -> None:
    """Refuse norms that are not what their mapping says, by trying them on two vectors.

    ``rms`` is ``x / rms(x) · (weight + offset)``; ``layer`` takes the mean from ``x`` before and
    adds a bias behind; either may lack its parameters. Neither the kind nor the offset shows in a
    module's name, and folding with the wrong one changes the model.

    Args:
        norms: what their mapping says, and the modules, their weights in memory.
    """
    given, vectors = list(norms), cache(_vectors)
    with torch.no_grad():
        figures = numbers(chain(*(_tried(*norm, vectors) for norm in given)))
    for norm, error, size in zip(given, figures[::2], figures[1::2], strict=True):
        _check_tried(*norm, error, size)


def _vectors(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (1.0 + 3.0 * torch.randn(2, size, generator=generator, device="cpu")).to(device)


def _tried(
    norm: FoldedNorm, module: nn.Module, vectors: Callable[[int, torch.device], Tensor]
) -> tuple[Tensor, Tensor]:
    """How far a norm is off, and the size of its bias over its weight."""
    check_norm_form(norm.name, module, norm.kind, norm.width)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        weight, offset = torch.ones(norm.width), 0.0
    else:
        check_parameter(f"{norm.name}.weight", weight)
        offset = norm.offset
    x = vectors(weight.numel(), weight.device)
    # The class's forward, so that no hook of the user runs.
    got = type(module).forward(module, x.to(weight.dtype)).double()
    x, gamma = x.double(), weight.double() + offset
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    expected = torch.nn.functional.normalize(x, dim=-1) * weight.numel() ** 0.5 * gamma
    if bias is not None:
        expected = expected + bias.double()
    error = (got - expected).norm() / expected.norm().clamp_min(1e-30)
    quotient = gamma.new_zeros(1) if bias is None else _quotient(bias, gamma)
    return error, quotient.square().mean().sqrt()


def _check_tried(norm: FoldedNorm, module: nn.Module, error: float, size: float) -> None:
    name, bias = norm.name, getattr(module, "bias", None)
    weight: Any = getattr(module, "weight", None)
    offset = 0.0 if weight is None else norm.offset
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    if not error < 1.5 * torch.finfo(dtype).eps + 1e-4:
        form = "(x - mean(x)) / std(x)" if norm.kind == "layer" else "x / rms(x)"
        raise RotationError(
            f"{name} ({type(module).__name__}) does not compute {form} · (weight + {offset:g}) "
            f"(off by {error:.1%}): it centres or does not, or has another offset; correct "
            "NormMapping.offset or kind, or leave R1 out for this model"
        )
    if bias is not None and not size <= LARGEST_QUOTIENT.get(bias.dtype, 10.0):
        gamma = weight.detach().double() + offset
        channel = int(_quotient(bias.detach(), gamma).abs().nan_to_num(torch.inf).argmax())
        raise RotationError(
            f"{name} has a bias of {float(bias[channel]):.2g} at channel {channel}, where its "
            f"weight is (almost) zero, {float(gamma[channel]):.2g}: folded, the bias would be "
            f"{size:.2g} times what it is added to, and {bias.dtype} would round as coarsely; "
            "leave R1 out for this model"
        )


def _quotient(bias: Tensor, gamma: Tensor) -> Tensor:
    """The bias divided by the weight stands in the rotated stream, and is rounded with it."""
    return torch.where(bias == 0, 0.0, bias.double() / gamma)
