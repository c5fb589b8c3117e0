"""Who looks on while an operator runs: compilers, tracers, modes, subclasses, derivatives."""

import functools
import operator

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad


def is_plain(x: Tensor) -> bool:
    """Whether nobody looks on: no compiler, tracer, mode, subclass, transform or derivative.

    Then the operator's way through torch ends in its kernel, and a decode step, which finds the
    caches full of weights, saves half of its time without it.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(x) is Tensor
        and not x.requires_grad
        and torch._C._dispatch_keys(x).raw_repr() in _ORDINARY
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _NOBODY
        and not torch._C._is_torch_function_mode_enabled()
        and forward_ad._current_level < 0
    )


def is_transformed(x: Tensor, signs: Tensor | None) -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks on.

    What is registered with an operator serves neither, an ``autograd.Function`` both.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:  # no tangents anywhere
        return False
    given = x, x if signs is None else signs
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


def _sets(*keys: DispatchKey) -> tuple[int, int]:
    """The first key and all of them: what inference mode leaves, and what it does not."""
    sets = [DispatchKeySet(key) for key in keys]
    return sets[0].raw_repr(), functools.reduce(operator.or_, sets).raw_repr()


# The keys that torch adds by itself to every call, and those of a tensor that owns plain memory.
_NOBODY = _sets(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)
_ORDINARY = tuple(
    keys | DispatchKeySet(autocast).raw_repr()
    for backend, autograd, autocast in (
        (DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.AutocastCPU),
        (DispatchKey.CUDA, DispatchKey.AutogradCUDA, DispatchKey.AutocastCUDA),
    )
    for keys in _sets(backend, autograd, DispatchKey.ADInplaceOrView)
)
