"""What else computes a Hadamard transform, where it is installed."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from measure.device import interpreted
from measure.oracle import halves
from measure.timing import Run

DENSE_OPERATIONS = 8e12
"""A dense product with more than that is left out."""


def transforms(x: Tensor, signs: Tensor | None, dim: int) -> dict[str, Run]:
    """The transform of x by torch (dense, two smaller products) and by other packages."""
    n = x.shape[dim]
    p, q = (half.to(x.dtype) for half in halves(n))
    q = q * n**-0.5  # rounded in 16 bits where n is no power of four
    found: dict[str, Run] = {}

    def two_products() -> Tensor:
        y = x if signs is None else x * (signs if dim else signs[:, None])
        if dim:
            return (p.T @ y.view(-1, len(p), len(q)) @ q).view(x.shape)
        y = (p.T @ y.view(len(p), -1)).view(len(p), len(q), -1)
        return (q.T @ y).view(x.shape)

    found["torch, two products"] = two_products
    if signs is not None:
        return found
    if 2 * n * x.numel() <= DENSE_OPERATIONS and n <= 16384:
        h = torch.kron(p, q)
        found["dense"] = (lambda: x @ h) if dim else (lambda: h.T @ x)
    if not dim:
        found["transposed copies"] = lambda: transposed_copies(x)
    elif n & (n - 1) == 0 and n <= 32768 and not interpreted():
        if importlib.util.find_spec("fast_hadamard_transform"):
            theirs = importlib.import_module("fast_hadamard_transform").hadamard_transform
            found["fast-hadamard-transform"] = lambda: theirs(x, n**-0.5)
        if x.dtype != torch.float32 and (tensor_cores := hadacore()):
            found["HadaCore"] = lambda: tensor_cores(x)
    return found


def transposed_copies(x: Tensor) -> Tensor:
    """Along the first dimension by the kernel for the last one and two copies."""
    from fastrot.kernels import hadamard_transform

    rows = hadamard_transform(x.T.contiguous(), x.shape[0] ** -0.5, impl="triton")
    return rows.T.contiguous()


@cache
def hadacore() -> Callable[[Tensor], Tensor] | None:
    """HadaCore's transform, from its own package or vLLM's."""
    if importlib.util.find_spec("faster_hadamard_transform"):
        module = importlib.import_module("faster_hadamard_transform")
        return lambda x: module.hadamard_transform(x, False)
    if importlib.util.find_spec("vllm"):
        module = importlib.import_module("vllm._custom_ops")
        return lambda x: module.hadacore_transform(x, False)
    return None
