"""The names in a model, read once, and what patterns find among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from fastrot.patterns import NoMatchError, matches, no_match_message
from fastrot.rotations import Rotation

T = TypeVar("T")


class Index:
    """The modules and parameters of a model by name; what a pattern names is looked up once.

    Whoever asks for many patterns makes one and passes it where a model is taken. It knows the
    names of the moment: after a module is replaced, make another.

    Attributes:
        model: whose names these are.
        modules: every module once, in the model's order; the model itself is ``""``.
        things: modules, each followed by its own parameters.
        owners: parameter → its module.
        rotations: those that were asked for, each once.
        units: their blocks, each once.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules())
        self.things: dict[str, nn.Module | nn.Parameter] = {}
        self.owners: dict[str, str] = {}
        for owner, module in self.modules.items():
            self.things[owner] = module
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{owner}.{leaf}" if owner else leaf
                self.things[name], self.owners[name] = parameter, owner
        self.rotations: dict[Rotation, Rotation] = {}
        self.units: dict[Rotation, Rotation] = {}
        self._named: dict[str, set[str]] = {}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by each of its names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def module(self, name: str) -> nn.Module:
        """A module by any of its names."""
        return self.modules[name] if name in self.modules else self.model.get_submodule(name)

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.model.config

    @property
    def class_name(self) -> str:
        """The class of the model, for messages."""
        return type(self.model).__name__

    @staticmethod
    def of(model: nn.Module | Index) -> Index:
        """The index of a model, or itself."""
        return model if isinstance(model, Index) else Index(model)

    def named(self, pattern: str) -> set[str]:
        """All modules and parameters that a pattern names."""
        if pattern not in self._named:
            found = {name for name, thing in self.things.items() if matches(name, pattern, thing)}
            self._named[pattern] = found
        return self._named[pattern]

    def pick(
        self,
        things: Mapping[str, T],
        patterns: Iterable[str],
        ignore: Iterable[str],
        missing_ok: bool,
    ) -> dict[str, T]:
        """Those of ``things`` that the patterns name, in the model's order."""
        found: set[str] = set()
        for pattern in patterns:
            names = things.keys() & self.named(pattern)
            if not names and not missing_ok:
                raise NoMatchError(no_match_message(self.model, pattern, things))
            found |= names
        found -= {name for pattern in ignore for name in self.named(pattern)}
        return {name: things[name] for name in self.things if name in found}


def outline(model: nn.Module | Index) -> str:
    """A digest of the names and shapes of all parameters, and of which of them are one."""
    first: dict[int, str] = {}
    digest = hashlib.sha256()
    for name, parameter in Index.of(model).parameters.items():
        tied = first.setdefault(id(parameter), name)
        digest.update(f"{name} {tuple(parameter.shape)} {tied}\n".encode())
    return digest.hexdigest()


def find_modules(
    model: nn.Module | Index,
    patterns: Iterable[str],
    ignore: Iterable[str] = (),
    *,
    missing_ok: bool = False,
) -> dict[str, nn.Module]:
    """The modules that any of the patterns names, in the model's order.

    Args:
        model: where to look.
        patterns: what to look for.
        ignore: patterns of modules to leave out.
        missing_ok: let patterns match nothing.

    Raises:
        NoMatchError: one of the patterns names nothing.
    """
    index = Index.of(model)
    modules = {name: module for name, module in index.modules.items() if name}
    return index.pick(modules, patterns, ignore, missing_ok)


def find_holders(
    model: nn.Module | Index,
    patterns: Iterable[str],
    ignore: Iterable[str] = (),
    *,
    missing_ok: bool = False,
) -> dict[str, nn.Module | nn.Parameter]:
    """As :func:`find_modules`, and bare parameters: those whose module the patterns do not name."""
    index, patterns = Index.of(model), tuple(patterns)
    named = {name for pattern in patterns for name in index.named(pattern)}
    things = {
        name: thing
        for name, thing in index.things.items()
        if name and index.owners.get(name) not in named
    }
    return index.pick(things, patterns, ignore, missing_ok)
