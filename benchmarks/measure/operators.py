"""The operators under test: one to come is one more row of :data:`OPERATORS`."""

from torch import Tensor

from measure import fused
from measure.operator import Data, Operator
from measure.oracle import transformed
from measure.peers import transforms
from measure.timing import Run


def transform(data: Data) -> Tensor:
    """The orthonormal transform, as anybody calls it."""
    from fastrot.kernels import hadamard_transform

    scale = data.x.shape[data.dim] ** -0.5
    return hadamard_transform(data.x, scale, dim=data.dim, signs=data.signs, impl="triton")


def in_place(data: Data) -> Tensor:
    """The same without a new tensor and without the dispatcher."""
    from fastrot.kernels.gpu import transform

    x = data.x
    n = x.shape[data.dim]
    v = x.view(-1, n, 1 if data.dim else x.shape[1])
    transform(v, v, data.signs, n**-0.5, False)
    return x


def _transforms(data: Data) -> dict[str, Run]:
    return transforms(data.x, data.signs, data.dim)


def _transformed(rows: tuple[Tensor, ...], signs: Tensor | None) -> Tensor:
    return transformed(rows[0], signs)


OPERATORS = {
    "transform": Operator(transform, _transforms, _transformed),
    "in place": Operator(in_place, _transforms, _transformed),
    **fused.operators(),
}
