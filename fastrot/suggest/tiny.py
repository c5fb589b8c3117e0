"""A small random copy of a model's class, in which every parameter matters."""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel

from fastrot.errors import RotationError

HEADS = re.compile(r"(num|n)_.*heads?$|^n_heads?$")
HEAD_SIZES = re.compile(r"head_(dim|size)|d_head$|rotary_dim$|d_kv$")
WIDTHS = re.compile(
    r"hidden|intermediate|inner|ffn|ff_dim|mlp|embd|embed|model|rank|width|d_ff|d_ssm"
)
NO_WIDTHS = re.compile(r"^(max|num)_|layers?|type|act|dropout|token|prob|per_layer")
CAPS = {  # names, and what suffices of them
    r"vocab_size": 64,
    r"^(n_positions|n_ctx|max_position_embeddings|max_seq_len)$": 256,
    r"num_(local_|routed_)?experts$|n_routed_experts$": 8,
    r"experts_per_tok|moe_(top_?k|k)$|^top_k$": 2,
    r"^n_group$|^num_expert_group$": 2,  # of four experts each
    r"^topk_group$": 1,
    r"chunk_size$": 16,
}
LARGEST = 5e7  # the probe holds six gradients of each
SPECIAL = 8
BATCH, LENGTH = 8, 12


class InFloat64(TorchFunctionMode):
    """Nothing is rounded to float32 on the way, as norms and softmaxes otherwise do."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with float64 wherever it says float32."""

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double().clone()  # a copy, as a conversion would be
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def tiny_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 model of the same class: few layers, small sizes, random values.

    Layers are the shortest beginning in which every kind of layer occurs. Sizes shrink by common
    factors, so that products which a class relies on (heads times head size is the width) still
    hold; if the class does not accept that, they shrink less.

    Raises:
        RotationError: no smaller configuration runs.
    """
    problem: Exception | None = None
    for heads, sizes, rope in ((True, True, True), (False, True, True), (False, False, False)):
        config = copy.deepcopy(model.config)
        try:
            _shrink(config, _layers_needed(model), heads, sizes, rope)
            with torch.device("meta"):
                size = sum(p.numel() for p in type(model)(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                raise RotationError(f"it still has {size:.1e} parameters")
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.default_generator.manual_seed(0)
                small = type(model)._from_config(config, attn_implementation="eager")
            small = small.to(torch.float64).eval()
            _randomize(small)
            if hasattr(small, "set_experts_implementation"):
                small.set_experts_implementation("eager")  # torch groups no float64 products
            if bool(logits(small, random_ids(small, 0)).isfinite().all()):
                return small
            problem = problem or ValueError("its logits are not finite")
        except Exception as error:  # whatever a class has against it; the first counts
            problem = problem or error
    raise RotationError(
        f"no small copy of {type(model).__name__} could be made and run ({problem}); describe it "
        "by hand with mappings= and norm_mappings="
    ) from problem


def random_ids(model: PreTrainedModel, seed: int) -> Tensor:
    """Token ids for a copy, none of them special: the row of padding gets no gradient."""
    generator = torch.Generator().manual_seed(seed)
    vocab: Any = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    return torch.randint(SPECIAL, vocab, (BATCH, LENGTH), generator=generator)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of a forward pass without a cache."""
    with InFloat64():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def cached_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same, and those of the last token after all others are in a cache."""
    with InFloat64():
        before = model(input_ids=ids[:, :-1], use_cache=True)
        caches = {name: value for name, value in before.items() if isinstance(value, Cache)}
        last: Tensor = model(input_ids=ids[:, -1:], **caches, use_cache=True).logits
    return torch.cat([logits(model, ids), last], 1)


def _layers_needed(model: PreTrainedModel) -> int:
    """Length of the shortest beginning of the layers in which every kind of layer occurs.

    A kind is what a layer's parameters are called, their shapes, and its entry in every list that
    the configuration holds for all layers.
    """
    total = getattr(model.config, "num_hidden_layers", 0)
    # A list without repetitions holds indices, not kinds.
    lists = [
        [str(entry) for entry in value]
        for value in vars(model.config).values()
        if isinstance(value, list) and len(value) == total > len({str(v) for v in value})
    ]
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    kinds = [
        str(
            [
                [(name, tuple(p.shape)) for name, p in stack[i].named_parameters()]
                for stack in stacks
            ]
            + [entries[i] for entries in lists]
        )
        for i in range(total)
    ]
    return max([2, *(kinds.index(kind) + 1 for kind in kinds)])


def _shrink(config: Any, layers: int, heads: bool, sizes: bool, rope: bool) -> None:
    total = getattr(config, "num_hidden_layers", 0)
    entries = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    for key, value in entries.items():
        if isinstance(value, list) and len(value) == total and key != "architectures":
            setattr(config, key, value[:layers])
        if key.endswith("_token_id") and isinstance(value, int) and value >= SPECIAL:
            setattr(config, key, len(key) % SPECIAL)
        for pattern, cap in CAPS.items():
            if re.search(pattern, key) and type(value) is int:
                setattr(config, key, min(value, cap))
    if total:
        config.num_hidden_layers = min(layers, total)
    config.tie_word_embeddings = False
    by, per_head = _factors(config, entries, heads)
    for key in entries:
        if sizes and (factor := _factor(key, by, per_head)) > 1:
            setattr(config, key, _scaled(getattr(config, key), factor))
    if rope:
        _plain_rope(config)


def _factors(config: Any, entries: dict[str, Any], heads: bool) -> tuple[int, int]:
    """By how much head counts shrink, and by how much the size of a head does."""

    def ints(pattern: re.Pattern[str]) -> list[int]:
        return [v for k, v in entries.items() if pattern.search(k) and type(v) is int and v > 0]

    counts, sizes, width = ints(HEADS), ints(HEAD_SIZES), getattr(config, "hidden_size", None)
    if type(width) is int and type(entries.get("head_dim")) is not int:
        count = getattr(config, "num_attention_heads", None) or 1
        sizes.append(width // count)
    smallest = 16 if counts else 96
    by = max((d for d in _divisors(counts) if min(counts) // d >= 2), default=1)
    per_head = max((d for d in _divisors(sizes) if min(sizes) // d >= smallest), default=1)
    return (by if heads else 1), per_head


def _divisors(numbers: list[int]) -> Iterator[int]:
    common = math.gcd(*numbers)
    return (d for d in range(1, common + 1) if common % d == 0)


def _factor(key: str, by: int, per_head: int) -> int:
    if HEAD_SIZES.search(key):
        return per_head
    if HEADS.search(key):
        return by
    return by * per_head if WIDTHS.search(key) and not NO_WIDTHS.search(key) else 1


def _scaled(value: Any, factor: int) -> Any:
    """A size, or sizes of all layers; what is no multiple was a ratio, or never large."""
    if isinstance(value, list):
        return [_scaled(item, factor) for item in value]
    return value // factor if type(value) is int and value % factor == 0 and value > 0 else value


def _plain_rope(config: Any) -> None:
    """Positions without tables for long contexts, which have the length of a whole head."""
    found = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *found.values()):
        if isinstance(rope, dict) and "rope_type" in rope:
            tables = [key for key, value in rope.items() if isinstance(value, list)]
            rope.update(dict.fromkeys(tables), rope_type="default")


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Matrices keep the variance of their input, everything else moves away from where it is."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if isinstance(module, nn.Embedding):
                parameter.copy_(0.3 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * noise.clamp(-1.5, 1.5))
