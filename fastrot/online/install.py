"""Puts online rotations on a model and takes them off."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.online.attention import check_attention, rotate_keys
from fastrot.online.blocks import (
    FORWARDS,
    check_block,
    check_own_forward,
    place_of,
    places_of,
    set_places,
)
from fastrot.online.experts import (
    ExpertsForward,
    check_experts,
    experts_forward,
    experts_input_dim,
)
from fastrot.online.parallel import check_width, input_dim, width_of
from fastrot.online.rotation import OnlineRotation
from fastrot.online.witness import watch
from fastrot.sites import holds_itself
from fastrot.transform_config import ATTENTION_LOCATIONS


class Undo(Protocol):
    """What :func:`attach` needs of a journal."""

    def on_error(self, action: Callable[[], object]) -> None:
        """Remember what takes a change back."""


def check_site(model: nn.Module, site: OnlineSite) -> None:
    """Refuse a module in which the rotation of a site can't act, or not as the model is set."""
    module = model.get_submodule(site.module)
    if site.location in ATTENTION_LOCATIONS:
        check_attention(site.module, module)
        return
    holder, child = _holder(model, site)
    if site.location == "down_input":
        check_experts(site.module, module)
    elif child is not None:
        check_block(site.module, site, model)
    name = site.module if child is None else site.module.rpartition(".")[0]
    check_own_forward(name, site.group, holder)


def _holder(model: nn.Module, site: OnlineSite) -> tuple[nn.Module, str | None]:
    """The module that holds the rotation of a site, and the name in it of the one it acts on.

    A linear module may be replaced by another, so the block around it holds what acts there.
    """
    module = model.get_submodule(site.module)
    if site.location not in ("input", "output") or holds_itself(site.module, module):
        return module, None
    owner, _, child = site.module.rpartition(".")
    return model.get_submodule(owner), child


def make(
    model: nn.Module, sites: Sequence[OnlineSite], device: torch.device | None = None
) -> list[OnlineRotation]:
    """The module of every site, with its operand on a device, or where the site's weights are."""
    made = []
    for site in sites:
        module = model.get_submodule(site.module)
        rotation = OnlineRotation(site, device or _device(module), _holder(model, site)[1])
        made.append(rotation.train(module.training))
    return made


def _device(module: nn.Module) -> torch.device:
    """Where a module computes."""
    weight = next(module.parameters(), None)
    if weight is None:
        return torch.device("cpu")
    # accelerate may keep weights elsewhere, and bring them while a module is called.
    hooks = (vars(child).get("_hf_hook") for child in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    place = next((place for place in places if place is not None), None)
    return weight.device if place is None or not weight.is_meta else torch.device(place)


def attach(
    model: nn.Module,
    sites: Sequence[OnlineSite],
    rotations: Sequence[OnlineRotation],
    journal: Undo,
) -> None:
    """Put the rotation of every site into the module that holds it, with what makes it act.

    Args:
        model: the model the sites were resolved for.
        sites: the online part of a plan.
        rotations: what :func:`make` made of them.
        journal: is told how each step is taken back.
    """
    journal.on_error(_snapshot(model))
    for site, rotation in zip(sites, rotations, strict=True):
        holder, _ = _holder(model, site)
        journal.on_error(_snapshot(holder))
        setattr(holder, rotation.name, rotation)
        _hook(holder, rotation)
    _watch(model)


def _watch(model: Any) -> None:
    if any(rotation.location in ATTENTION_LOCATIONS for _, _, rotation in installed(model)):
        # Continuous batching changes to flash attention by itself where the model says it can.
        model._supports_flash_attn = False
    else:
        vars(model).pop("_supports_flash_attn", None)
    # Queries and keys are rotated by one module: where it is replaced, both are not.
    watch(
        model,
        (
            (tuple(holder.split(".")) if holder else (), rotation.name, rotation.group)
            for holder, _, rotation in installed(model)
            if rotation.location not in ATTENTION_LOCATIONS
        ),
    )


def plain_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module's class."""
    return type(module).forward(module, *args, **kwargs)


class PlainForward(functools.partial[Any]):
    """:func:`plain_forward` in the place of a bound method; tools may bind its function anew.

    torch.compile takes what it traced for another model of the class, without asking for hooks. It
    does ask for a forward of the module's own.
    """

    __func__ = staticmethod(plain_forward)


def _hook(module: nn.Module, rotation: OnlineRotation) -> None:
    if place := place_of(rotation):
        set_places(module, (*places_of(module), *place))
    elif rotation.location == "k_cache":
        if not any(name in module.__dict__ for name in FORWARDS):
            module.forward = PlainForward(plain_forward, module)
        module.register_forward_pre_hook(rotate_keys, with_kwargs=True)
    elif rotation.location == "down_input":
        # No hook reaches inside a forward. A partial survives deepcopy and pickle. Hooks of
        # accelerate stand around the forward that they keep.
        name = FORWARDS["_old_forward" in module.__dict__]
        setattr(module, name, ExpertsForward(experts_forward, module))


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module, OnlineRotation]]:
    """All online rotations of a model: name and module of the holder, the rotation."""
    for name, module in list(model.named_modules()):
        for child in list(module.children()):
            if isinstance(child, OnlineRotation):
                yield name, module, child


def acts_on(holder: str, rotation: OnlineRotation) -> str:
    """Name of the module on which a rotation acts: that which holds it, or a child of that."""
    return ".".join(part for part in (holder, rotation.child) if part)


def check_parts(model: nn.Module) -> None:
    """Refuse tensor parallelism that cuts a block of a rotation in two.

    Raises:
        RotationError: names the module, and block sizes that work.
    """
    for holder, module, rotation in installed(model):
        weight: Any = None
        if rotation.location == "input" and rotation.child is not None:
            module = getattr(module, rotation.child)
            weight, dim = getattr(module, "weight", None), input_dim(module)
        elif rotation.location == "down_input":
            weight, dim = module.down_proj, experts_input_dim(module)
        if isinstance(weight, Tensor):
            width = width_of(weight, dim)
            check_width(acts_on(holder, rotation), rotation.group, rotation.rotation, width)


def rotation_at(model: nn.Module, site: OnlineSite) -> OnlineRotation | None:
    """What is installed for a site."""
    holder, child = _holder(model, site)
    name = f"fastrot_{child}_{site.location}" if child else f"fastrot_{site.location}"
    found = getattr(holder, name, None)
    return found if isinstance(found, OnlineRotation) else None


def uninstall(model: nn.Module, groups: Collection[str], journal: Undo) -> None:
    """Take the online rotations of these groups off, hooks and submodules, and nothing else."""
    journal.on_error(_snapshot(model))
    for _, module, rotation in installed(model):
        if rotation.group in groups:
            journal.on_error(_snapshot(module))
            delattr(module, rotation.name)
            _unhook(module, rotation)
    _watch(model)


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A way back to the children and hooks that a module has now, in their order."""
    places: tuple[dict[Any, Any], ...] = (
        module._modules,
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._load_state_dict_pre_hooks,
    )
    copies = [dict(place) for place in places]
    names = (*FORWARDS, "_supports_flash_attn")
    own = {name: module.__dict__[name] for name in names if name in module.__dict__}

    def restore() -> None:
        for place, saved in zip(places, copies, strict=True):
            place.clear()
            place.update(saved)
        for name in names:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)

    return restore


def _unhook(module: nn.Module, rotation: OnlineRotation) -> None:
    if place := place_of(rotation):
        set_places(module, tuple(p for p in places_of(module) if p not in place))
    elif rotation.location == "down_input":
        _own_forward(module)
    elif rotation.location == "k_cache":
        if isinstance(module.__dict__.get("forward"), PlainForward):
            del module.forward
        # Handles do not survive deepcopy and pickle; the functions do.
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is rotate_keys:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _own_forward(module: nn.Module) -> None:
    for name in FORWARDS:
        if getattr(module.__dict__.get(name), "func", None) is experts_forward:
            delattr(module, name)
            if name == "_old_forward":
                setattr(module, name, type(module).forward.__get__(module))
