"""R4 inside stacked experts: what their gate or activation makes is rotated before it goes down.

transformers' experts implementations ``batched_mm`` and ``grouped_mm`` call methods of the module
for it; its eager loop does not, so a module with R4 runs ``grouped_mm`` instead (``batched_mm`` in
float64).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.online.parallel import check_part
from fastrot.online.rotation import OnlineRotation
from fastrot.online.view import view

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
"""The experts implementations around which R4 can be put."""


def _rotated(module: Any, name: str) -> Callable[[Tensor], Tensor]:
    """The gate or the activation of experts, with the rotation behind it."""

    def function(up: Tensor) -> Tensor:
        return _turned(module, getattr(module, name)(up))

    return function


def _turned(module: Any, x: Tensor) -> Tensor:
    """The input of the down projections, of which a process may have a part."""
    rotation: OnlineRotation = module.fastrot_down_input
    part = x.shape[-1] != rotation.rotation.size
    if part:
        place, dim = type(module).__name__, experts_input_dim(module)
        check_part(place, rotation.group, rotation.rotation, x, module.down_proj, dim)
    result: Tensor = rotation(x, part)
    return result


def experts_input_dim(module: Any) -> int:
    """Where the down projections of experts have their inputs."""
    return 1 if is_llama4(module) or module.is_transposed else 2


def on_interface(module: nn.Module) -> bool:
    """Whether an experts module dispatches through transformers' experts interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def is_llama4(module: nn.Module) -> bool:
    """Whether these are Llama 4's experts: every expert sees every token, in one product."""
    return type(module).__name__ == "Llama4TextExperts"


def check_experts(name: str, module: nn.Module) -> None:
    """Refuse experts into which R4 can't be put."""
    if not (on_interface(module) or is_llama4(module)):
        raise RotationError(
            f"R4: the experts of {name} ({type(module).__name__}) do not use transformers' experts "
            "interface, so nothing can act between their activation and their down projection; "
            "leave R4 out"
        )
    implementation = _implementation(module)
    if on_interface(module) and implementation not in IMPLEMENTATIONS:
        raise RotationError(
            f"R4: {name} uses experts implementation {implementation!r}; R4 works with "
            f"{' and '.join(IMPLEMENTATIONS)}: call "
            f"model.set_experts_implementation({IMPLEMENTATIONS[0]!r}) first"
        )


def _implementation(module: Any) -> str:
    name = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if name not in (None, "eager", "fastrot"):
        return str(name)
    # torch has no grouped product in float64.
    return IMPLEMENTATIONS[module.down_proj.dtype == torch.float64]


def experts_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of an experts module with R4; arguments are those of the module's own."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if is_llama4(module):
        return _llama4_forward(module, *args, **kwargs)
    name = _implementation(module)
    if name not in IMPLEMENTATIONS:
        raise RuntimeError(
            f"R4 rotates inside this {type(module).__name__}, which experts implementation "
            f"{name!r} would skip; call model.set_experts_implementation({IMPLEMENTATIONS[0]!r})"
        )
    # Experts without a gate have an activation alone.
    names = {method: _rotated(module, method) for method in ("_apply_gate", "act_fn")}
    result: Tensor = ALL_EXPERTS_FUNCTIONS[name](view(module, names), *args, **kwargs)
    return result


class ExpertsForward(functools.partial[Any]):
    """:func:`experts_forward` in the place of a bound method; tools may bind its function anew."""

    __func__ = staticmethod(experts_forward)


def _llama4_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """Tokens come sorted by expert, as many for each: ``(experts · tokens, hidden)``."""
    x = hidden_states.view(len(module.gate_up_proj), -1, module.hidden_size)
    gate, up = torch.bmm(x, module.gate_up_proj).chunk(2, dim=-1)
    down = torch.bmm(_turned(module, up * module.act_fn(gate)), module.down_proj)
    return down.view(-1, module.hidden_size)
