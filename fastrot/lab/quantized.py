"""A model that runs as if it were quantized: rounded weights, inputs, keys and values.

What is quantized are the linear modules in the decoder's layers, their inputs, and what enters the
cache. The embedding, the norms and the head keep their precision. Online rotations come before the
rounding: R4 because a block rotates what it hands to its linear module, R3 because it stands before
the cache.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.lab.cache import Watch, watched
from fastrot.lab.quantizers import fake_quantize
from fastrot.lab.schemes import Numbers, Scheme


@contextmanager
def quantized(model: Any, scheme: Scheme | str) -> Iterator[None]:
    """Quantize a causal language model of transformers, as long as the context lasts.

    Rotate first: a rotation that is applied inside would act on rounded numbers. The original
    weights are kept beside the rounded ones, and come back bit for bit.

    Raises:
        RotationError: an unknown scheme, a group that does not fit, or a layer with weights that
            are not in linear modules, such as stacked experts.
    """
    scheme = Scheme.parse(scheme)
    linears = linears_of(model)
    with ExitStack() as stack:
        if scheme.kv is not None:
            stack.enter_context(watched(model, kv_rounding(scheme.kv)))
        if scheme.activations is not None:
            for name, module in linears.items():
                hook = _input_rounding(name, scheme.activations)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        if scheme.weights is not None:
            for name, module in linears.items():
                with _naming(f"{name}.weight"):
                    rounded = rounded_weight(module, scheme.weights)
                stack.callback(setattr, module.weight, "data", module.weight.data)
                module.weight.data = rounded
        yield


def linears_of(model: Any) -> dict[str, nn.Module]:
    """The linear modules in the layers of a decoder, by name.

    Raises:
        RotationError: no layers are found, or one holds a matrix that is in no linear module.
    """
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    for prefix, layer in decoder_layers(model).items():
        for name, module in layer.named_modules(prefix=prefix):
            if isinstance(module, (nn.Linear, Conv1D)):
                found[name] = module
                continue
            own = dict(module.named_parameters(recurse=False))
            matrices = [leaf for leaf, parameter in own.items() if parameter.dim() > 1]
            if matrices and ".fastrot_" not in f".{name}":
                raise RotationError(
                    f"{name}.{matrices[0]} ({type(module).__name__}) is the weight of no linear "
                    "module, and simulated quantization knows only these"
                )
    return found


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """The layers of a model's decoder, by name.

    Raises:
        RotationError: no list of modules is as long as the configuration says.
    """
    count = model.config.get_text_config().num_hidden_layers
    inside = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside:
            return {f"{name}.{index}": layer for index, layer in enumerate(module)}
    raise RotationError(f"{type(model).__name__} has no list of {count} layers")


@torch.no_grad()
def rounded_weight(module: Any, numbers: Numbers) -> Tensor:
    """The weight of a linear module, rounded along its inputs."""
    weight: Tensor = module.weight.data
    if isinstance(module, nn.Linear):
        return fake_quantize(weight, numbers)
    return fake_quantize(weight.T, numbers).T.contiguous()


def kv_rounding(numbers: Numbers) -> Watch:
    """Rounds keys and values as they enter a :class:`~fastrot.lab.cache.WatchedCache`."""

    def rounding(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        with _naming(f"keys and values of layer {layer}"):
            return fake_quantize(keys, numbers), fake_quantize(values, numbers)

    return rounding


def _input_rounding(name: str, numbers: Numbers) -> Any:
    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with _naming(f"input of {name}"):
            return (fake_quantize(args[0], numbers), *args[1:])

    return rounding


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except RotationError as error:
        raise RotationError(f"{what}: {error}") from None
