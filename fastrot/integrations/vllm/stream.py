"""R1 on the residual stream of vLLM's models: behind norms, and at the ends of the stream.

vLLM asks no quantization method for norms and layers, so they get their rotations when the model is
built. It compiles the model around them, which passes by hooks; a forward of the module's own is
traced.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

from fastrot.edits import OnlineSite
from fastrot.integrations.vllm.layers import online

STREAM = ("hidden_states", "x", "input", "residual")
"""What vLLM and transformers call the arguments of layers and norms whose sum is the stream."""


def rotate_stream(module: nn.Module, site: OnlineSite) -> bool:
    """Let a norm or a decoder layer rotate what it gets of the stream, or what it makes.

    Args:
        module: vLLM's, whole on every rank.
        site: the rotation of its ``input`` or ``output``.

    Returns:
        Whether it does; a layer with a quantization method, or one that is compiled by itself,
        can't be rotated here.
    """
    if hasattr(module, "quant_method") or isinstance(module, TorchCompileWithNoGuardsWrapper):
        return False
    forward: Callable[..., Any] = module.forward
    if site.location == "output":
        rotated = _rotating_output(module, forward)
    elif site.location == "input" and (places := _stream_arguments(module)):
        rotated = _rotating_input(module, forward, places)
    else:
        return False
    setattr(module, f"fastrot_{site.location}", online(site))
    module.forward = rotated
    return True


def _stream_arguments(module: nn.Module) -> dict[str, int]:
    """The arguments of a forward that make up the stream, and their positions."""
    # vLLM's own operators take any arguments, and hand them to one of their implementations.
    function = getattr(module, "forward_native", module.forward)
    names = list(inspect.signature(function).parameters)
    return {name: names.index(name) for name in STREAM if name in names}


def _rotating_input(
    module: Any, forward: Callable[..., Any], places: dict[str, int]
) -> Callable[..., Any]:
    def rotated(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        # A layer adds its two parts up later. To rotate each of them is to rotate the sum.
        for name, at in places.items():
            if at < len(given) and given[at] is not None:
                given[at] = module.fastrot_input(given[at])
            elif kwargs.get(name) is not None:
                kwargs[name] = module.fastrot_input(kwargs[name])
        return forward(*given, **kwargs)

    return rotated


def _rotating_output(module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def rotated(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if isinstance(result, tuple):  # with the sum that was normed, which is the stream already
            return module.fastrot_output(result[0]), *result[1:]
        return module.fastrot_output(result)

    return rotated
