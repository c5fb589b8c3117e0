"""Puts online rotations on a model and takes them off."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.online.attention import PREFIX, check_attention, rotate_keys
from fastrot.online.experts import check_experts, experts_forward
from fastrot.online.rotation import OnlineRotation
from fastrot.transform_config import ATTENTION_LOCATIONS

FORWARDS = ("forward", "_old_forward")
"""Where a module may have a forward of its own; the second is accelerate's."""


class Undo(Protocol):
    """What :func:`attach` needs of a journal."""

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute so that it can be taken back."""

    def on_error(self, action: Callable[[], object]) -> None:
        """Remember what takes a change back."""


def check_site(site: OnlineSite, module: nn.Module) -> None:
    """Refuse a module in which the rotation of a site can't act, or not as the model is set."""
    if site.location in ATTENTION_LOCATIONS:
        check_attention(site.module, module)
    elif site.location == "down_input":
        check_experts(site.module, module)


def make(model: nn.Module, sites: Sequence[OnlineSite]) -> list[OnlineRotation]:
    """The module of every site, with its operand where the site's weights are."""
    made = []
    for site in sites:
        module = model.get_submodule(site.module)
        weight = next(module.parameters(), None)
        device = torch.device("cpu") if weight is None else weight.device
        made.append(OnlineRotation(site, device).train(module.training))
    return made


def attach(
    model: nn.Module,
    sites: Sequence[OnlineSite],
    rotations: Sequence[OnlineRotation],
    journal: Undo,
) -> None:
    """Put the rotation of every site into the model as ``fastrot_<location>``, with its hook.

    Args:
        model: the model the sites were resolved for.
        sites: the online part of a plan.
        rotations: what :func:`make` made of them.
        journal: is told how each step is taken back.
    """
    for site, rotation in zip(sites, rotations, strict=True):
        module = model.get_submodule(site.module)
        journal.on_error(_snapshot(module))
        setattr(module, f"fastrot_{site.location}", rotation)
        _hook(module, site.location, journal)


def _hook(module: nn.Module, location: str, journal: Undo) -> None:
    if location == "output":
        module.register_forward_hook(_rotate_output)
    elif location == "input":
        module.register_forward_pre_hook(_rotate_input, with_kwargs=True)
    elif location == "k_cache":
        module.register_forward_pre_hook(rotate_keys, with_kwargs=True)
    elif location == "down_input":
        # No hook reaches inside a forward. A partial survives deepcopy and pickle. Hooks of
        # accelerate stand around the forward that they keep.
        place = FORWARDS["_old_forward" in module.__dict__]
        setattr(module, place, partial(experts_forward, module))
    if location in ATTENTION_LOCATIONS:
        config: Any = module.config
        name = config._attn_implementation
        if not name.startswith(PREFIX):
            journal.set(config, "_attn_implementation", PREFIX + name)


def installed(model: nn.Module) -> Iterator[tuple[nn.Module, str, OnlineRotation]]:
    """All online rotations of a model: the module, the location, the rotation."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, OnlineRotation):
                yield module, name.removeprefix("fastrot_"), child


def uninstall(model: nn.Module, groups: Collection[str], journal: Undo) -> None:
    """Take the online rotations of these groups off, hooks and submodules, and nothing else."""
    for module, location, rotation in installed(model):
        if rotation.group in groups:
            journal.on_error(_snapshot(module))
            delattr(module, f"fastrot_{location}")
            _drop_hook(module, location)
    if not any(location in ATTENTION_LOCATIONS for _, location, _ in installed(model)):
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            name = getattr(config, "_attn_implementation", None)
            if isinstance(name, str) and name.startswith(PREFIX):
                journal.set(config, "_attn_implementation", name.removeprefix(PREFIX))


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A way back to the children and hooks that a module has now, in their order."""
    places: tuple[dict[Any, Any], ...] = (
        module._modules,
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
    )
    copies = [dict(place) for place in places]
    forwards = {name: module.__dict__[name] for name in FORWARDS if name in module.__dict__}

    def restore() -> None:
        for place, saved in zip(places, copies, strict=True):
            place.clear()
            place.update(saved)
        for name in FORWARDS:
            module.__dict__.pop(name, None)
        module.__dict__.update(forwards)

    return restore


def _drop_hook(module: nn.Module, location: str) -> None:
    if location == "down_input":
        _own_forward(module)
    # Handles do not survive deepcopy and pickle; the functions do.
    function = {"input": _rotate_input, "output": _rotate_output, "k_cache": rotate_keys}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook is function.get(location):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _own_forward(module: nn.Module) -> None:
    for name in FORWARDS:
        if getattr(module.__dict__.get(name), "func", None) is experts_forward:
            delattr(module, name)
            if name == "_old_forward":
                setattr(module, name, type(module).forward.__get__(module))


def _rotate_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rotation: Any = module.fastrot_input
    if args:
        return (rotation(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": rotation(kwargs["input"])}


def _rotate_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    rotation: Any = module.fastrot_output
    result: Tensor = rotation(output)
    return result
