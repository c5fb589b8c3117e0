"""What an operator should give, in float64, and how far an output may be from it."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from measure.cases import Job
from measure.device import device

BUDGET = {"bf16": 1.1, "fp16": 1.5}
"""Admissible RMS error, in errors of correct rounding."""

ULPS = 4
"""Admissible error of a float32 vector, in ulps of its norm."""


@cache
def halves(n: int) -> tuple[Tensor, Tensor]:
    """P and Q of similar order, float64, with H_n = P ⊗ Q."""
    import numpy as np

    from fastrot.hadamard import base_matrix, factors

    bases, power = factors(n)
    atoms = [*bases, *[2] * (power.bit_length() - 1)]
    first, second = np.ones((1, 1)), np.ones((1, 1))
    while atoms:
        if len(first) <= len(second):
            first = np.kron(first, base_matrix(atoms.pop(0)))
        else:
            second = np.kron(base_matrix(atoms.pop()), second)
    return torch.from_numpy(first).to(device()), torch.from_numpy(second).to(device())


def transformed(rows: Tensor, signs: Tensor | None) -> Tensor:
    """The orthonormal transform of vectors in rows, in float64, by dense products."""
    p, q = halves(rows.shape[1])
    x = rows.double() if signs is None else rows.double() * signs.double()
    y = p.T @ x.view(-1, len(p), len(q)) @ q
    return y.reshape(rows.shape) * rows.shape[1] ** -0.5


def errors(
    outputs: dict[str, Tensor],
    exact: Callable[[Callable[[Tensor], Tensor]], Tensor],
    rounded: Callable[[Tensor], Tensor],
    eps: float,
    dim: int,
) -> dict[str, Job]:
    """RMS error of each output over that of correct rounding; its largest error in ulps.

    Args:
        outputs: of one shape, their vectors along ``dim``.
        exact: gives the exact vectors, in rows of float64; it is handed the function that takes
            those vectors out of a tensor, in rows, which are of interest at the moment.
        rounded: rounds exact vectors once to the format of the outputs.
        eps: distance of 1 from the next number of the dtype.
        dim: -1 or 0.
    """
    sums = {name: [0.0, 0.0] for name in outputs}
    rounding = 0.0
    shape = next(iter(outputs.values())).shape
    step = max(1, (1 << 24) // shape[dim])
    for start in range(0, shape[1 + dim], step):

        def rows(t: Tensor, start: int = start) -> Tensor:
            part = t.narrow(1 + dim, start, min(step, t.shape[1 + dim] - start))
            return part if dim else part.T

        truth = exact(rows)
        norms = truth.norm(dim=1) * eps
        rounding += (rounded(truth).double() - truth).square().sum().item()
        for name, output in outputs.items():
            error = rows(output).double() - truth
            sums[name][0] += error.square().sum().item()
            worst = (error.norm(dim=1) / norms).max().item()
            # max() alone would let a NaN pass.
            sums[name][1] = worst if worst != worst else max(sums[name][1], worst)
    return {
        name: {"error": (square / max(rounding, 1e-300)) ** 0.5, "ulps": ulps}
        for name, (square, ulps) in sums.items()
    }


def verdict(found: Job, dtype: str) -> Job:
    """``status`` (``"ok"`` or ``"wrong"``) and the ``budget`` that an error is held to."""
    bound, limit = ("ulps", ULPS) if dtype == "fp32" else ("error", BUDGET[dtype])
    return {"budget": limit, "status": "ok" if found[bound] <= limit else "wrong"}
