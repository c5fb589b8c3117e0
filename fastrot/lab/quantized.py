"""A model that runs as if it were quantized: rounded weights, inputs, keys and values.

What is quantized are the linear modules in the decoder's layers, their inputs, and what enters the
cache. The embedding, the norms and the head keep their precision. Online rotations come before the
rounding: R4 because a block rotates what it hands to its linear module, R3 because it stands before
the cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.lab.cache import Watch, watched
from fastrot.lab.gptq import calibrated, gptq, inputs_of
from fastrot.lab.quantizers import fake_quantize
from fastrot.lab.schemes import Numbers, Scheme


@contextmanager
def quantized(model: Any, scheme: Scheme | str, text: Tensor | None = None) -> Iterator[None]:
    """Quantize a causal language model of transformers, as long as the context lasts.

    Rotate first: a rotation that is applied inside would act on rounded numbers. The original
    weights are kept beside the rounded ones, and come back bit for bit.

    Args:
        model: as it is to be quantized.
        scheme: what is rounded, and how.
        text: token ids, ``(n, length)``, on which GPTQ is calibrated.

    Raises:
        RotationError: an unknown scheme, a group that does not fit, or a layer with weights that
            are not in linear modules, such as stacked experts; GPTQ without text.
    """
    scheme = Scheme.parse(scheme)
    linears = linears_of(model) if scheme.weights or scheme.activations else {}
    # While nothing else is quantized, since GPTQ runs the model.
    rounded = [*_rounded(model, linears, scheme.weights, text)] if scheme.weights else []
    with ExitStack() as stack:
        if scheme.kv is not None:
            stack.enter_context(watched(model, kv_rounding(scheme.kv)))
        if scheme.activations is not None:
            shape: list[int] = []
            noting = model.register_forward_pre_hook(_noting(shape), with_kwargs=True)
            stack.callback(noting.remove)
            for name, module in linears.items():
                hook = _input_rounding(name, scheme.activations, shape)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        for weight, data in rounded:
            stack.callback(setattr, weight, "data", weight.data)
            weight.data = data
        yield


def linears_of(model: Any) -> dict[str, nn.Module]:
    """The linear modules in the layers of a decoder, by name.

    Raises:
        RotationError: no layers are found, one holds a matrix that is in no linear module, or
            slices of weights are multiplied past their modules.
    """
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config()
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise RotationError(
            f"pretraining_tp={config.pretraining_tp} multiplies slices of weights past their "
            "linear modules, whose inputs nobody sees then; set slow_but_exact=False"
        )
    found: dict[str, nn.Module] = {}
    for prefix, layer in decoder_layers(model).items():
        for name, module in layer.named_modules(prefix=prefix):
            if isinstance(module, (nn.Linear, Conv1D)):
                found[name] = module
                continue
            own = dict(module.named_parameters(recurse=False))
            matrices = [leaf for leaf, parameter in own.items() if parameter.dim() > 1]
            if "norm" in type(module).__name__.lower():
                continue  # of every head, which keep their precision
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
    decoder = model.get_decoder()
    inside, direct = set(decoder.modules()), set(decoder.children())
    found = [
        (module not in direct, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    if not found:
        raise RotationError(f"{type(model).__name__} has no list of {count} layers")
    _, name = min(found, key=lambda each: each[0])  # a tower inside may have as many
    return {f"{name}.{index}": layer for index, layer in enumerate(model.get_submodule(name))}


def layer_of(name: str, layers: Iterable[str]) -> int | None:
    """The number of the layer that a module is in, by names; None if it is in no layer."""
    return next((i for i, layer in enumerate(layers) if name.startswith(f"{layer}.")), None)


def check_groups(model: Any, scheme: Scheme) -> None:
    """Refuse a scheme that does not fit a model.

    Args:
        model: runs on two tokens if keys and values are to be rounded.
        scheme: whose groups must divide the inputs of linear modules and what enters the cache.

    Raises:
        RotationError: names the scheme and the place.
    """
    kinds = [numbers for numbers in (scheme.weights, scheme.activations) if numbers]
    for name, module in linears_of(model).items() if kinds else ():
        inputs = inputs_of(module)
        for group in (numbers.group for numbers in kinds if numbers.group):
            if inputs % group:
                raise RotationError(
                    f"scheme {scheme}: {inputs} inputs of {name} do not divide into groups of "
                    f"{group}"
                )
    if scheme.kv is not None:
        rounding = watched(model, kv_rounding(scheme.kv))
        with naming(f"scheme {scheme}"), torch.no_grad(), rounding:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))


@torch.no_grad()
def _rounded(
    model: Any, linears: Mapping[str, Any], numbers: Numbers, text: Tensor | None
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The weights of linear modules, and what they are rounded to along their inputs."""
    moments: Iterable[tuple[str, Tensor | None]] = ((name, None) for name in linears)
    if numbers.gptq:
        if text is None:
            raise RotationError("gptq needs text to calibrate on; give windows of token ids")
        moments = calibrated(model, linears, text)
    for name, moment in moments:
        module = linears[name]
        plain = isinstance(module, nn.Linear)
        weight = module.weight.data if plain else module.weight.data.T
        with naming(f"{name}.weight"):
            if moment is None:
                rounded = fake_quantize(weight, numbers)
            else:
                rounded = gptq(weight, moment, numbers)
        yield module.weight, rounded if plain else rounded.T.contiguous()


def kv_rounding(numbers: Numbers) -> Watch:
    """Rounds keys and values as they enter a :class:`~fastrot.lab.cache.WatchedCache`."""

    def rounding(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        with naming(f"keys and values of layer {layer}"):
            return _window_by_window(keys, numbers), _window_by_window(values, numbers)

    return rounding


def _noting(shape: list[int]) -> Any:
    """Keeps how many windows, and tokens in each, the running call of a model has."""

    def noting(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if ids is None else ids
        shape[:] = given.shape[:2] if isinstance(given, Tensor) else ()

    return noting


def _input_rounding(name: str, numbers: Numbers, shape: list[int]) -> Any:
    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        # OPT and others lay the tokens of all windows in one row of vectors.
        flat = x.dim() == 2 and len(shape) == 2 and len(x) == shape[0] * shape[1]
        with naming(f"input of {name}"):
            rounded = _window_by_window(x.unflatten(0, shape) if flat else x, numbers)
        return (rounded.reshape(x.shape), *args[1:])

    return rounding


def _window_by_window(x: Tensor, numbers: Numbers) -> Tensor:
    """Round activations so that windows of one batch, the first dimension, share no scale."""
    whole = numbers.per == "tensor" or numbers.format == "nvfp4"
    if not whole or x.dim() < 3:
        return fake_quantize(x, numbers)
    return torch.stack([fake_quantize(each, numbers) for each in x])


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of a refusal what it is about."""
    try:
        yield
    except RotationError as error:
        raise RotationError(f"{what}: {error}") from None
