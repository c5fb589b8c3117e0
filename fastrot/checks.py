"""Refusals: whether a model, a parameter or a norm is what a rotation can act on."""

import inspect

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AlreadyRotatedError(ValueError):
    """A rotation that was applied before: a second Hadamard transform would undo the first."""


def check_model(model: nn.Module) -> None:
    """Refuse what is no plain causal language model.

    Raises:
        TypeError: no ``nn.Module``, or one without a transformers configuration.
        ValueError: a model that is quantized or an encoder-decoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"this is a {type(model).__name__}, a compiled model; rotate the model itself "
            "(model._orig_mod), then torch.compile it"
        )
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise TypeError(
            f"{type(model).__name__} has no transformers config; pass the model itself, not a "
            "wrapper around it"
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} carries LoRA adapters, which read and write the rotated "
            "spaces too; merge_and_unload() first, or rotate the base model and train anew"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; fastrot rotates decoders")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        get = quantization.get if isinstance(quantization, dict) else quantization.__dict__.get
        method = get("quant_method")
        if method != "fastrot":
            raise ValueError(
                f"the model is quantized (quant_method={getattr(method, 'value', method)}); "
                "rotate the unquantized model, then quantize"
            )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that can't be read and written in place, exactly.

    Raises:
        ValueError: names the parameter, what it is, and the way out.
    """
    if parameter.is_meta:
        raise ValueError(
            f"{name} is on the meta device (not loaded, or offloaded); load the whole model into "
            "memory before rotating it"
        )
    if parameter.dtype not in FLOATS:
        raise ValueError(
            f"{name} has dtype {parameter.dtype}: quantized weights can't be rotated exactly; "
            "rotate the unquantized model, then quantize"
        )
    if type(parameter) not in (nn.Parameter, Tensor) or type(parameter.data) is not Tensor:
        raise ValueError(
            f"{name} is a {type(parameter.data).__name__}, not a plain tensor (quantized or "
            "sharded); rotate the plain model first"
        )
    if parameter.is_inference():
        raise ValueError(f"{name} was made under torch.inference_mode() and is read-only; clone it")
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    if not dense:
        raise ValueError(
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
            raise ValueError(
                f"{last[2]} and {name} lie on the same memory; give one of them a copy of its own "
                "(parameter.data = parameter.data.clone())"
            )
        if device != last[0] or end > last[1]:
            last = (device, end, name)


def check_norm(name: str, module: nn.Module, offset: float) -> None:
    """Refuse a norm that is not ``x / rms(x) · (weight + offset)``, by trying it on two vectors.

    Centring (LayerNorm) does not commute with a rotation, and folding with the wrong offset
    changes the model: neither shows in a module's name.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        raise ValueError(f"{name} ({type(module).__name__}) has no parameter 'weight' to fold")
    if getattr(module, "bias", None) is not None:
        raise ValueError(
            f"{name} ({type(module).__name__}) has a bias: R1 needs an RMSNorm without one; "
            "leave R1 out for this model"
        )
    check_parameter(f"{name}.weight", weight)
    generator = torch.Generator().manual_seed(0)
    x = 1.0 + 3.0 * torch.randn(2, weight.numel(), generator=generator, device="cpu")
    with torch.no_grad():
        # The class's forward, so that no hook of the user runs.
        got = type(module).forward(module, x.to(weight.device, weight.dtype)).double().cpu()
    expected = torch.nn.functional.normalize(x.double(), dim=-1) * weight.numel() ** 0.5
    expected = expected * (weight.detach().double().cpu() + offset)
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < 1.5 * torch.finfo(weight.dtype).eps + 1e-4:
        raise ValueError(
            f"{name} ({type(module).__name__}) does not compute x / rms(x) · (weight + {offset:g}) "
            f"(off by {error:.1%}): it centres its input or has another offset; correct "
            "NormMapping.offset, or leave R1 out for this model"
        )


def check_linear(group: str, name: str, module: nn.Module) -> None:
    """Refuse what is no plain linear or embedding: one whose parameters are weight and bias."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"{group}: {name} is a {type(module).__name__}; fused rotations act on nn.Linear "
            "and nn.Embedding"
        )
    for attribute in ("weight", "bias"):
        value = getattr(module, attribute, None)
        if value is not None and module._parameters.get(attribute) is None:
            raise ValueError(
                f"{group}: {name} has a {attribute!r} that is no parameter (quantized or "
                "parametrized?); rotate the plain model first"
            )
    further = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
    if further:
        raise ValueError(
            f"{group}: {name} ({type(module).__name__}) has further parameters, "
            f"{', '.join(further)}, which are not rotated (an adapter?); merge them first"
        )


def check_loaded(name: str, module: nn.Module) -> None:
    """Refuse a module whose weights are not in memory."""
    if any(tensor.is_meta for tensor in module.parameters()):
        raise ValueError(
            f"{name} has weights on the meta device (not loaded, or offloaded); load the whole "
            "model into memory before rotating it"
        )


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_attention(name: str, module: nn.Module) -> None:
    """Refuse an attention module in which R3 can't stand between RoPE and the cache."""
    code = inspect.unwrap(type(module).forward).__code__
    on_interface = "get_interface" in code.co_names and "update" in code.co_names
    if not on_interface or "past_key_values" not in code.co_varnames:
        raise ValueError(
            f"{name} ({type(module).__name__}) does not use transformers' attention interface and "
            "cache, so R3 can't rotate its queries and keys after RoPE; leave R3 out"
        )
    implementation = str(module.config._attn_implementation)  # type: ignore[union-attr]
    if implementation.removeprefix("fastrot_") not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"{name} uses attention implementation {implementation!r}; R3 works with eager, sdpa "
            "and flex_attention: call model.set_attn_implementation('sdpa') first"
        )
