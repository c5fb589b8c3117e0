"""What an operator under test is: how it is called, held to account and compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from measure.timing import Run


class Data(NamedTuple):
    """What an operator gets."""

    inputs: tuple[Tensor, ...]
    """Of one shape and dtype, vectors along ``dim``."""
    signs: Tensor | None
    """``(n,)`` of ±1, int8."""
    dim: int
    """-1 or 0."""

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.inputs[0]


@dataclass(frozen=True)
class Operator:
    """An operator, what it is held to, and what it stands beside."""

    call: Callable[[Data], Any]
    pipelines: Callable[[Data], dict[str, Run]]
    """The same by name from other packages, or unfused, by several kernels of torch."""
    exact: Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
    """The result in float64, from inputs whose vectors lie in rows."""
    inputs: int = 1
    """Number of tensors that it reads; two for a product of gate and up projection."""
    width: Callable[[int], float] = lambda itemsize: 2 * itemsize
    """Bytes read and written per element of the result, from the size of an element."""
    values: Callable[[Any], Tensor] = lambda output: output
    """The numbers in an output, in the shape of an input."""
    rounded: Callable[[Tensor, torch.dtype], Tensor] = lambda exact, dtype: exact.to(dtype)
    """The exact result after the one rounding that the output's format asks for."""
