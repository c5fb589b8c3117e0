"""A model notices when a module that held a rotation is replaced by one that holds none.

Tools may replace whole blocks: experts by linear modules, an MLP by a fused one. What a block knows
goes with it, so the model itself remembers where its rotations are.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastrot.online.rotation import OnlineRotation
from fastrot.online.view import refuse_replica

Place = tuple[tuple[str, ...], str, str]
"""Path of the module that holds a rotation, name of the rotation in it, and its group."""


def watch(model: nn.Module, places: Iterable[Place]) -> None:
    """Let the forward of a model look for its rotations there, and nowhere else."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "func", None) is check_held:
            del model._forward_pre_hooks[key]
    places = tuple(places)
    if places:
        # A partial survives deepcopy and pickle.
        model.register_forward_pre_hook(functools.partial(check_held, places))


def check_held(places: tuple[Place, ...], model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a model: refuse to run where a rotation was lost with its block.

    Where the block itself is gone, as a layer that was pruned, nothing is left to rotate. A wrapper
    around the block may have moved it inside.

    Raises:
        RuntimeError: names the rotation, the block, and the way out.
    """
    if torch.compiler.is_compiling():
        return
    refuse_replica(model)
    for path, name, group in places:
        block: Any = model
        for part in path:
            block = None if block is None else block._modules.get(part)
        if block is None or hasattr(block._modules.get(name), "rotation"):
            continue
        if not _inside(block, name):
            raise RuntimeError(
                f"{group}: {'.'.join(path)} ({type(block).__name__}) does not rotate any more, "
                "though its weights are rotated: it was replaced, or its rotation deleted; load "
                "the model anew, and replace such a block before fastrot.apply or leave "
                f"{group} out"
            )


def _inside(module: nn.Module, name: str) -> bool:
    return any(isinstance(m, OnlineRotation) and m.name == name for m in module.modules())
