"""Tiny models in which every parameter matters, and a fingerprint of everything a model is."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fastrot
from fastrot.integrations.transformers import cache_argument

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # always has biases on q, k and v
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True}),
}


def tiny(
    model_type: str,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int = 96,
    intermediate: int = 112,
    layers: int = 2,
    vocab: int = 64,
    seed: int = 0,
    **config_kwargs: Any,
):
    """A model in evaluation mode; the same values in every dtype, rounded once.

    Leaves the global random state as it was.
    """
    config_class, model_class, biases = CLASSES[model_type]
    config = config_class(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **(biases | config_kwargs),
    )
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).to(dtype).eval()
    perturb(model, seed)
    return model


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Values under which an edit that is left out shows: norms 1 ± 0.3, biases 0.3, wide weights.

    Linears keep the variance of their input; the embedding does not drown the layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            values = noise * (0.3 if "embed" in name else parameter.shape[-1] ** -0.5)
        else:
            values = 0.3 * noise + (1.0 if "norm" in name else 0.0)
        parameter.copy_(values)


def random_ids(model: nn.Module, batch: int, length: int, seed: int) -> Tensor:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits in float64."""
    return model(ids).logits.double()


def relative_error(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm of ``b``; NaN never passes as small."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def levels(x):
    """The greatest number of distinct values in a vector along the last dimension."""
    return max(row.unique().numel() for row in x.reshape(-1, x.shape[-1]))


def inputs_of_linears(model, ids):
    """What the linears really multiply with: seen after all other hooks."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0].clone()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def cached(model: nn.Module, ids: list[Tensor], cache: Any):
    """The layers of a cache after a model has read some ids, part by part."""
    with torch.no_grad():
        for part in ids:
            model(part, **cache_argument(model, cache), use_cache=True)
    return cache.layers


def word_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Of a tiny model: a word ``w7`` for every id but those of padding and the end."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, vocab)}
    core = Tokenizer(WordLevel(words, "<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_rotated(folder: Path) -> tuple[nn.Module, float]:
    """Save a tiny model with all rotations; the model, and the sum of its logits on five ids."""
    model = tiny("llama")
    fastrot.apply(model, ("R1", "R2", "R3", "R4"))
    model.save_pretrained(folder)
    return model, logits(model, random_ids(model, 1, 5, seed=0)).sum().item()


class Same:
    """Equal only to a reference to the same object, which it keeps alive."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that belongs to a model, flat: equal before and after if nothing was touched.

    Bytes, identity, memory, layout and gradient of every parameter and buffer; identity, class,
    hooks and attributes of every module; state-dict keys; every configuration.
    """
    entries: dict[str, Any] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        entries |= {f"{name}: {key}": value for key, value in _tensor(tensor).items()}
    configs = {"generation_config": getattr(model, "generation_config", None)}
    for name, module in model.named_modules(remove_duplicate=False):
        entries[f"{name}: module"] = (Same(module), type(module))
        entries |= {f"{name}: {key}": _freeze(value) for key, value in vars(module).items()}
        configs[f"{name}.config"] = getattr(module, "config", None)
    entries["state_dict"] = list(model.state_dict()) if hasattr(model, "state_dict") else None
    for name, config in configs.items():
        if hasattr(config, "to_dict"):
            entries[f"{name}: to_dict"] = _freeze(config.to_dict())
            entries |= {f"{name}: {key}": _freeze(value) for key, value in vars(config).items()}
            entries[f"{name}: attention"] = getattr(config, "_attn_implementation", None)
    return entries


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The entries in which two fingerprints differ, for the message of an assertion."""
    return [
        key
        for key in sorted({*before, *after})
        if key not in before or key not in after or before[key] != after[key]
    ]


def _tensor(tensor: Tensor) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "object": Same(tensor),
        "type": (type(tensor), type(tensor.data)),
        "layout": (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.requires_grad),
        "grad": None if tensor.grad is None else (Same(tensor.grad), _digest(tensor.grad)),
    }
    if type(tensor.data) is Tensor and not tensor.is_meta:
        place = (tensor.data_ptr(), tensor.stride(), tensor.storage_offset())
        entries |= {"memory": place, "bytes": _digest(tensor)}
    return entries


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).cpu()
    return hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest()


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(_freeze(key), _freeze(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_freeze(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (str, int, float, bool, torch.dtype, torch.device)):
        return (type(value), value)
    return Same(value)
