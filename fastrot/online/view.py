"""Running a forward on a view of its module, in which some names stand for something else."""

import ctypes
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

LISTS_DICT = torch.__version__ >= "2.12"
"""Whether torch.compile can trace what asks a module's ``__dict__`` for all that it holds."""


def view(module: nn.Module, names: Mapping[str, Any]) -> Any:
    """A module of the same class with the same state, for one call.

    Args:
        module: what is viewed.
        names: what stands for some of its attributes, submodules and methods.
    """
    twin = object.__new__(type(module))
    held = twin.__dict__
    if LISTS_DICT or not torch.compiler.is_dynamo_compiling():
        held.update(module.__dict__)
        held.update(names)
    else:
        for name, value in (*_listed(module.__dict__, module), *names.items()):
            held[name] = value
    held["fastrot_viewed"] = module
    return twin


def write_back(twin: nn.Module, names: Mapping[str, Any]) -> None:
    """Give a module the attributes that its forward set on the view."""
    held = twin.__dict__
    module = held["fastrot_viewed"]
    own = module.__dict__
    plain = LISTS_DICT or not torch.compiler.is_dynamo_compiling()
    for name, value in held.items() if plain else _listed(held, module):
        if name not in names and name != "fastrot_viewed" and own.get(name) is not value:
            own[name] = value


def refuse_replica(module: nn.Module) -> None:
    """Refuse a replica of DataParallel: a forward of its own is still that of the original.

    Raises:
        RuntimeError: it is one.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"this {type(module).__name__} is a replica made by torch.nn.DataParallel, and its "
            "online rotations would compute with the weights of the original; use "
            "DistributedDataParallel (torchrun), or make one GPU visible (CUDA_VISIBLE_DEVICES)"
        )


def _listed(held: dict[str, Any], module: nn.Module) -> list[tuple[str, Any]]:
    """What the ``__dict__`` of a module or of its view holds, while the module is traced."""
    return [(name, held[name]) for name in _names(id(module)) if name in held]


def _names(address: int) -> tuple[str, ...]:
    """The attributes that a module has, and those that its methods may set.

    Nothing but constants passes into such a function; ``id`` guards that it is this module.
    """
    module: nn.Module = ctypes.cast(address, ctypes.py_object).value
    return tuple({**module.__dict__, **dict.fromkeys(sorted(mentioned(type(module))))})


# torch.compiler.assume_constant_result sets no more, but imports the whole compiler.
_names._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mentioned(kind: type) -> frozenset[str]:
    """All attributes that the methods of a class read or set, but those of torch's own."""
    functions = (
        inspect.unwrap(value) if callable(value) else value
        for owner in kind.__mro__
        if owner.__module__.partition(".")[0] != "torch"
        for name, value in vars(owner).items()
        if name != "__init__"
    )
    codes = (getattr(function, "__code__", None) for function in functions)
    return frozenset(name for code in codes if code for name in _names_in(code))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
