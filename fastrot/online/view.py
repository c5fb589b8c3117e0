"""Running a forward on a view of its module, in which some names stand for something else."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def view(module: nn.Module, names: Mapping[str, Any]) -> Any:
    """A module of the same class with the same state, for one call.

    Args:
        module: what is viewed.
        names: what stands for some of its attributes, submodules and methods.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["fastrot_viewed"] = module
    twin.__dict__.update(names)
    return twin


def write_back(twin: nn.Module, names: Mapping[str, Any]) -> None:
    """Give a module the attributes that its forward set on the view."""
    module = twin.__dict__["fastrot_viewed"]
    own = module.__dict__
    for name, value in twin.__dict__.items():
        if name not in names and name != "fastrot_viewed" and own.get(name) is not value:
            own[name] = value
