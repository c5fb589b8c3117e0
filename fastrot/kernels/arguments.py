"""What every transform asks of its arguments."""

import operator
from functools import lru_cache
from numbers import Real

import torch
from torch import Tensor

from fastrot.errors import RotationError
from fastrot.hadamard import factors

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
"""Values of ``impl``; ``auto`` follows the device."""

SIGN_BYTES = b"\x01\xff"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_factors = lru_cache(factors)  # a hit takes a third of the time that asking again does


def check(x: Tensor, signs: Tensor | None, size: int, dim: int, impl: str) -> None:
    """Runs inside the operator, where no tracer follows it."""
    if x.layout is not torch.strided:
        raise TypeError(f"a transform takes dense tensors, got {x.layout}; pass x.to_dense()")
    check_sizes(x.shape, x.dtype, size, dim)
    if signs is not None:
        check_place(signs, size, x.device)
    check_impl(impl, x.device)


def check_sizes(shape: torch.Size, dtype: torch.dtype, size: int, dim: int) -> None:
    """Refuse a dtype, and blocks that have no Hadamard matrix or do not divide the dimension."""
    if dtype not in DTYPES:
        raise TypeError(
            f"hadamard_transform takes float64, float32, bfloat16 or float16, got {dtype}"
        )
    if isinstance(size, int):  # a tracer's symbol is asked when it has a value
        _factors(size)
    if shape[dim] % size:
        raise RotationError(f"block_size={size} does not divide dimension {dim} of {tuple(shape)}")


def check_place(signs: Tensor, size: int, device: torch.device) -> None:
    """Refuse signs of another shape, on another device, or of a dtype that has no ±1."""
    if signs.dtype == torch.bool or signs.is_complex():
        raise RotationError(f"signs is {signs.dtype}, expected real numbers of ±1")
    if signs.shape != (size,):
        raise RotationError(f"signs has shape {tuple(signs.shape)}, expected ({size},)")
    if signs.device != device:
        raise RotationError(
            f"signs lies on {signs.device} and x on {device}; pass signs.to(x.device)"
        )


def check_scale(scale: object) -> None:
    """Refuse what is no number."""
    if isinstance(scale, Tensor):
        raise RotationError(
            "scale is a tensor, expected a number; pass float(scale), or multiply the result by it "
            "if it is learned"
        )
    if not isinstance(scale, (Real, torch.SymFloat, torch.SymInt)):
        raise RotationError(f"scale={scale!r} is no number")


def whole(name: str, value: object) -> int:
    """An argument as an int, numpy's integers too."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RotationError(f"{name}={value!r} is no whole number") from None


def check_out(x: Tensor, out: Tensor) -> None:
    """Refuse an ``out`` that can't take the result of transforming ``x``."""
    for name in ("shape", "dtype", "device"):
        mine, theirs = getattr(out, name), getattr(x, name)
        if mine != theirs:
            shown = (tuple(mine), tuple(theirs)) if name == "shape" else (mine, theirs)
            raise RotationError(f"out has {name} {shown[0]} and x {shown[1]}; they must agree")

    if any(step == 0 and size > 1 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise RotationError(
            f"out has more than one element in one place (strides {out.stride()}); pass out.clone()"
        )


def check_signs(signs: Tensor) -> None:
    """Refuse other values than ±1; on a GPU this waits for the device."""
    if signs.is_cpu and signs.dtype == torch.int8:
        # A fifth of the time of what follows, which a decode step would notice.
        others = signs.numpy().tobytes().translate(None, SIGN_BYTES)
        if not others:
            return
    wrong = (signs.abs() != 1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise RotationError(
            f"signs[{first}] is {signs[first].item()}, not ±1; multiply x by that diagonal yourself"
        )


def check_impl(impl: str, device: torch.device) -> None:
    """Refuse an unknown implementation, or one that can't run on ``device``."""
    if impl == "auto":
        return
    possible = {
        "auto": True,
        "reference": True,
        "cpu": device.type in ("cpu", "meta"),
        "triton": device.type in ("cuda", "cpu", "meta"),
    }
    if impl not in possible:
        raise RotationError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if not possible[impl]:
        usable = ", ".join(name for name in possible if possible[name])
        raise RotationError(f"impl={impl!r} cannot run on a {device.type} tensor; use {usable}")
