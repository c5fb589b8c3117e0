"""Rotations of what goes into a linear module and comes out of it, held by the block around it.

The block's forward runs on a view of the block, in which the linear's name stands for "rotate, then
call whatever module has that name now". So nothing that replaces the linear module, or wraps it,
can lose the rotation, and an adapter put around it later sees the rotated input.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.online.parallel import check_part, input_dim
from fastrot.online.rotation import OnlineRotation
from fastrot.online.view import mentioned, refuse_replica, view, write_back

Place = tuple[str, str]
"""Name of a linear module in its block, ``""`` for the block, and ``input`` or ``output``."""

FORWARDS = ("forward", "_old_forward")
"""Where a module may have a forward of its own; the second is accelerate's."""

DESCRIPTION = ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim")
PLAIN = (int, float, str, torch.dtype, torch.device, type(None))


class Weight:
    """What a forward may know of a weight that it does not call through its module: no values."""

    def __init__(self, tensor: Tensor, label: str):
        self._tensor = tensor
        self._label = label

    def __getattr__(self, name: str) -> Any:
        if name in DESCRIPTION:
            return getattr(self._tensor, name)
        raise _past(self._label)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse to compute with it."""
        values = (*args, *(kwargs or {}).values())
        raise _past(next((v._label for v in values if type(v) is cls), "an online rotation"))


def _past(label: str) -> RuntimeError:
    return RuntimeError(f"{label} is used past its module, where nothing rotates; call the module")


class StandIn:
    """Stands for a child of a block, for one call of the block."""

    def __init__(self, block: nn.Module, child: str, rotations: dict[str, nn.Module]):
        self.fastrot_block = block
        self.fastrot_child = child
        self.fastrot_rotations = rotations
        self.fastrot_called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the child, with its input and output rotated where they are to be."""
        self.fastrot_called = True
        module = self.fastrot_block._modules.get(self.fastrot_child)
        if module is None:
            raise RuntimeError(f"{_label(self)}: the module is gone; put one in its place")
        rotations = self.fastrot_rotations
        if "input" in rotations and args:
            args = (_rotated(self, module, args[0]), *args[1:])
        elif "input" in rotations:
            kwargs["input"] = _rotated(self, module, kwargs["input"])
        result = module(*args, **kwargs)
        return rotations["output"](result) if "output" in rotations else result

    def __getattr__(self, name: str) -> Any:
        value = getattr(getattr(self.fastrot_block, self.fastrot_child), name)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, Tensor):
            return Weight(value, f"{_label(self)}.{name}")
        raise _past(f"{_label(self)}.{name}")


def _rotated(stand_in: StandIn, module: nn.Module, x: Tensor) -> Any:
    """The input of a child, of which a process of tensor parallelism has a part."""
    rotation: Any = stand_in.fastrot_rotations["input"]
    part = x.shape[-1] != rotation.rotation.size
    if part:
        weight, place = getattr(module, "weight", None), stand_in.fastrot_child
        check_part(place, rotation.group, rotation.rotation, x, weight, input_dim(module))
    return rotation(x, part)


def _label(stand_in: StandIn) -> str:
    groups = (str(rotation.group) for rotation in stand_in.fastrot_rotations.values())
    block = type(stand_in.fastrot_block).__name__
    return f"{' and '.join(groups)} in {block}: {stand_in.fastrot_child}"


def block_forward(block: Any, places: tuple[Place, ...], *args: Any, **kwargs: Any) -> Any:
    """The forward of a block with rotations at ``places``; arguments are those of its own."""
    stand_ins: dict[str, StandIn] = {}
    ends: dict[str, Any] = {}
    for child, end in places:
        name = f"fastrot_{child}_{end}" if child else f"fastrot_{end}"
        rotation = block._modules.get(name)
        if not hasattr(rotation, "rotation"):
            raise RuntimeError(
                f"the rotation of the {end} of {child or 'it'} in this {type(block).__name__} is "
                f"gone ({name} is {type(rotation).__name__}); load the model anew"
            )
        if not child:
            ends[end] = rotation
            continue
        if child not in stand_ins:
            stand_ins[child] = StandIn(block, child, {})
        stand_ins[child].fastrot_rotations[end] = rotation
    if "input" in ends and args:
        args = (ends["input"](args[0]), *args[1:])
    elif "input" in ends:  # By name; the layers of transformers call it so.
        kwargs["hidden_states"] = ends["input"](kwargs["hidden_states"])
    result = _viewed(block, stand_ins, args, kwargs)
    return ends["output"](result) if "output" in ends else result


def _viewed(
    block: Any, stand_ins: dict[str, StandIn], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not stand_ins:
        return type(block).forward(block, *args, **kwargs)
    twin = view(block, stand_ins)
    result = type(block).forward(twin, *args, **kwargs)
    write_back(twin, stand_ins)
    for stand_in in stand_ins.values():
        if not stand_in.fastrot_called:
            raise RuntimeError(
                f"{_label(stand_in)} was not called by the block's forward, so nothing was rotated"
            )
    return result


def rebound_forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    """The same, where a tool binds it anew and nothing but the block remembers the places."""
    held = (m for m in block._modules.values() if isinstance(m, OnlineRotation))
    places = tuple(place for m in held for place in place_of(m))
    return block_forward(block, places, *args, **kwargs)


def check_own_forward(name: str, group: str, module: nn.Module) -> None:
    """Refuse a module whose forward was replaced, where a rotation would act in it.

    Raises:
        RotationError: names the module, trusted or not: its forward would be left out.
    """
    own = next((module.__dict__[n] for n in FORWARDS[::-1] if n in module.__dict__), None)
    plain = getattr(own, "__func__", None) is type(module).forward
    if own is not None and not plain and not _is_ours(own):
        raise RotationError(
            f"{group} acts in the forward of {name or 'the model'} ({type(module).__name__}), "
            "which was replaced; take that back, or leave it to a subclass"
        )


def place_of(rotation: OnlineRotation) -> tuple[Place, ...]:
    """Where the forward of its holder does this rotation; that of a key or of experts is none."""
    if rotation.child is None and rotation.location not in ("input", "output"):
        return ()
    return ((rotation.child or "", rotation.location),)


class BlockForward(functools.partial[Any]):
    """:func:`block_forward` in the place of a bound method; tools may bind its function anew."""

    __func__ = staticmethod(rebound_forward)


def check_block(name: str, site: OnlineSite, model: nn.Module) -> None:
    """Refuse a linear module that no forward of the module around it calls by its name."""
    owner, _, child = name.rpartition(".")
    block = model.get_submodule(owner)
    if child not in mentioned(type(block)):
        raise RotationError(
            f"{site.group}: nothing in the code of {owner or 'the model'} "
            f"({type(block).__name__}) calls {child!r} by its name, so its {site.location} can't "
            "be rotated online"
        )


def places_of(block: nn.Module) -> tuple[Place, ...]:
    """Where the forward of a block rotates now."""
    own: list[Any] = [block.__dict__.get(name) for name in FORWARDS]
    return next((f.args[1] for f in own if getattr(f, "func", None) is block_forward), ())


def set_places(block: nn.Module, places: tuple[Place, ...]) -> None:
    """Let the forward of a block rotate there and nowhere else, or be that of its class again."""
    held = next((n for n in FORWARDS if _is_ours(block.__dict__.get(n))), None)
    # Hooks of accelerate stand around the forward that they keep. A partial survives deepcopy and
    # pickle, unlike a bound method or the handle of a hook.
    name = held or FORWARDS["_old_forward" in block.__dict__]
    if places:
        setattr(block, name, BlockForward(block_forward, block, places))
    elif name == "_old_forward":
        setattr(block, name, type(block).forward.__get__(block))
    else:
        block.__dict__.pop(name, None)
    _drop(block._forward_pre_hooks, check_forward)
    _drop(block._load_state_dict_pre_hooks, rename_old)
    if places:
        block.register_forward_pre_hook(check_forward)
        block.register_load_state_dict_pre_hook(rename_old)


def _drop(hooks: dict[int, Any], function: Any) -> None:
    # Handles do not survive deepcopy and pickle; the functions do.
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook) is function:
            del hooks[key]


def _is_ours(function: Any) -> bool:
    return function is rebound_forward or getattr(function, "func", None) is block_forward


def check_forward(block: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a block: refuse a forward that was put in the place of ours."""
    refuse_replica(block)
    own = block.__dict__.get("forward")
    if not _is_ours(own) and not _reaches(own) and not _is_ours(block.__dict__.get("_old_forward")):
        places = (n[8:] for n, _ in block.named_children() if n.startswith("fastrot_"))
        raise RuntimeError(
            f"the forward of this {type(block).__name__} was replaced after a rotation was put on "
            f"it ({', '.join(places)}), and would not rotate; replace it before fastrot.apply"
        )


def _reaches(function: Any, depth: int = 8) -> bool:
    """Whether a callable holds our forward: as a partial, a wrapper, a method or a closure."""
    if function is None or depth == 0:
        return False
    if _is_ours(function):
        return True
    cells = [c.cell_contents for c in getattr(function, "__closure__", None) or ()]
    inner = [getattr(function, name, None) for name in ("__wrapped__", "func", "__func__")]
    return any(_reaches(f, depth - 1) for f in (*inner, *cells) if callable(f))


def rename_old(block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of a block: fastrot 0.1.0 kept the rotations on the linear modules."""
    for child, end in places_of(block):
        if not child:
            continue
        old, new = f"{prefix}{child}.fastrot_{end}.", f"{prefix}fastrot_{child}_{end}."
        for name in [name for name in state if name.startswith(old)]:
            state[new + name.removeprefix(old)] = state.pop(name)
