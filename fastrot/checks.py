"""Refusals: whether a model or a parameter is what a rotation can act on."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.errors import RotationError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AlreadyRotatedError(RotationError):
    """A rotation that was applied before: a second Hadamard transform would undo the first."""


def check_model(model: nn.Module) -> None:
    """Refuse what is no plain causal language model.

    Raises:
        TypeError: no ``nn.Module``, or one without a transformers configuration.
        RotationError: a model that is quantized or an encoder-decoder.
    """
    check_kind(model)
    check_adapters(model)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise RotationError(
            f"{type(model).__name__} is an encoder-decoder; fastrot rotates decoders"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        raise RotationError(f"{type(model).__name__} is an encoder; fastrot rotates decoders")
    method = quant_method(config)
    reason = None if method in (None, "fastrot") else _quantized(model)
    if reason:
        raise RotationError(
            f"the model is quantized (quant_method={method}, {reason}); rotate the unquantized "
            "model, then quantize"
        )


def check_kind(model: nn.Module) -> None:
    """Refuse what is no model of transformers itself.

    Raises:
        TypeError: no ``nn.Module``, a compiled one, or one without a transformers configuration.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"this is a {type(model).__name__}, a compiled model; pass the model itself "
            "(model._orig_mod), then torch.compile it"
        )
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(
            f"{type(model).__name__} has no transformers config; pass the model itself, not a "
            "wrapper around it"
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters of PEFT, whose weights lie in the spaces that a rotation turns.

    Raises:
        RotationError: says what to do with them first.
    """
    if hasattr(model, "peft_config"):
        raise RotationError(
            f"{type(model).__name__} carries adapters, which read and write the rotated spaces "
            "too; merge_and_unload() first, or rotate the base model and train anew"
        )


def quant_method(config: Any) -> str | None:
    """What a configuration says of quantization; a loader that dequantized may have left it."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    get = quantization.get if isinstance(quantization, dict) else quantization.__dict__.get
    method = get("quant_method")
    return str(getattr(method, "value", method))


def _quantized(model: nn.Module) -> str | None:
    """The first sign that weights are quantized, in words; None if all are plain numbers."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return "and no weights in memory that could say otherwise"
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
        if not plain or parameter.dtype not in FLOATS:
            return f"{name} is {parameter.dtype}" if plain else f"{name} is no plain tensor"
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if _SCALES.search(name):
            return f"it has {name}"
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
    return None


_SCALES = re.compile(r"(^|[._])(q?scales?|scale_inv|q?zeros?|zero_point|qweight|g_idx)$")


def check_parameter(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that can't be read and written in place, exactly.

    Raises:
        RotationError: names the parameter, what it is, and the way out.
    """
    if parameter.is_meta:
        raise RotationError(
            f"{name} is on the meta device (not loaded, or offloaded); load the whole model into "
            "memory before rotating it"
        )
    if parameter.dtype not in FLOATS:
        raise RotationError(
            f"{name} has dtype {parameter.dtype}: quantized weights can't be rotated exactly; "
            "rotate the unquantized model, then quantize"
        )
    if type(parameter.data).__name__ == "DTensor":
        raise RotationError(
            f"{name} is a DTensor (tensor parallelism, FSDP2): rotate the model before it is "
            "distributed, or rotate the checkpoint (fastrot rotate SRC DST) and load that"
        )
    if type(parameter) not in (nn.Parameter, Tensor) or type(parameter.data) is not Tensor:
        raise RotationError(
            f"{name} is a {type(parameter.data).__name__}, not a plain tensor (quantized?); "
            "rotate the plain model first"
        )
    if parameter.is_inference():
        raise RotationError(
            f"{name} was made under torch.inference_mode() and is read-only; clone it"
        )
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    if not dense:
        raise RotationError(
            f"{name} is a strided or expanded view with strides {parameter.stride()}; give it "
            "memory of its own with parameter.data = parameter.data.contiguous()"
        )


def check_overlaps(model: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse written parameters whose memory another parameter shares.

    Tied parameters (one object with two names) are the plan's business; here two objects lie on
    the same bytes, so that writing one would corrupt the other.
    """
    spans = []
    written = set(names)
    for name, parameter in model.named_parameters():
        if parameter.numel() and not parameter.is_meta and type(parameter.data) is Tensor:
            start = parameter.data_ptr()
            extent = sum(
                (n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
            )
            end = start + (extent + 1) * parameter.element_size()
            spans.append((str(parameter.device), start, end, name))
    spans.sort()
    last = ("", 0, "")
    for device, start, end, name in spans:
        if device == last[0] and start < last[1] and (name in written or last[2] in written):
            raise RotationError(
                f"{last[2]} and {name} lie on the same memory; give one of them a copy of its own "
                "(parameter.data = parameter.data.clone())"
            )
        if device != last[0] or end > last[1]:
            last = (device, end, name)


def check_loaded(name: str, module: nn.Module) -> None:
    """Refuse a module whose weights are not in memory."""
    if any(tensor.is_meta for tensor in module.parameters()):
        raise RotationError(
            f"{name} has weights on the meta device (not loaded, or offloaded); load the whole "
            "model into memory before rotating it"
        )


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
