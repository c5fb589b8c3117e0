"""A tiny random model of every family, in which every parameter matters.

``FAMILIES`` holds the rows; :func:`build` makes the model, :func:`inputs` what it is called with.
A family that the installed transformers does not know is left out of ``FAMILIES``.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family.

    Attributes:
        model_type: transformers' name of the configuration.
        model_class: name of the model's class in transformers.
        config: keyword arguments of the configuration; ``text_config`` and ``vision_config`` are
            dicts in it.
        variations: configuration keys (``"num_key_value_heads"``, ``"text_config.head_dim"``) and
            the values they may take, for fuzzing; the first is that of ``config``.
        exact: the limit of the relative float64 error: 1e-12 where nothing casts to float32
            (LayerNorm), else 1e-6.
        vision: makes the image inputs and the ids around them; None for text models.
        unread: how the names of parameters end that transformers does not read in this setting.
        ids: the smallest and (exclusive) largest token id that random text uses.
        since: release of transformers that can build it; None for all that know its type.
    """

    model_type: str
    model_class: str
    config: Mapping[str, Any]
    variations: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    exact: float = 1e-6
    vision: Callable[[nn.Module, torch.Generator], Inputs] | None = None
    ids: tuple[int, int] = (3, 64)
    unread: tuple[str, ...] = ()
    since: str | None = None


def build(
    family: Family,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    """The model in evaluation mode: the same values in every dtype, rounded once.

    Args:
        family: a row of ``FAMILIES``.
        dtype: of all parameters.
        seed: of the values.
        changes: configuration keys and values, dots as in ``Family.variations`` (use ``**{}``).

    Raises:
        ValueError: whatever transformers has against the configuration.
    """
    settings = copy.deepcopy(dict(family.config))
    for key, value in changes.items():
        place = settings
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    config = CONFIG_MAPPING[family.model_type](**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model_class)(config).eval()
    # Module.to would make complex buffers (Llama 4's positions in images) real.
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    if dtype == torch.float64:
        # torch has no grouped product in float64.
        model.set_experts_implementation("eager")
    perturb(model, seed)
    return model


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Values under which an edit that is left out shows.

    Norms stay within 0.6 … 1.4 of their neutral value, biases and positions are large, linears keep
    the variance of their input (experts too), buffers that bias a router differ from zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    def uniform(like: Tensor) -> Tensor:
        return 2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1

    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm and name == "weight":
                neutral = parameter.double().mean().round()
                values = neutral + 0.4 * uniform(parameter)
            elif isinstance(module, nn.Embedding):
                values = 0.3 * random(parameter)
            elif name in ("A_log", "D", "dt_bias"):
                values = parameter.double() + 0.3 * uniform(parameter)
            elif parameter.dim() < 2 or "bias" in name:
                values = 0.3 * random(parameter)
            else:
                transposed = type(module).__name__ == "Conv1D" or (
                    parameter.dim() == 3 and _is_transposed(module, name)
                )
                fan_in = parameter.shape[-2 if transposed else -1]
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    fan_in = parameter[0].numel()
                values = random(parameter) * fan_in**-0.5
            parameter.copy_(values)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("correction_bias"):
                buffer.copy_(0.1 * random(buffer))


def _is_transposed(module: nn.Module, name: str) -> bool:
    known = getattr(module, "is_transposed", None)
    return type(module).__name__ == "Llama4TextExperts" if known is None else known


def inputs(
    family: Family, model: nn.Module, batch: int = 2, length: int = 12, seed: int = 1
) -> Inputs:
    """Keyword arguments for the model: random ids, and images where it sees."""
    generator = torch.Generator().manual_seed(seed)
    if family.vision is not None:
        return family.vision(model, generator)
    ids = torch.randint(*family.ids, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _families() -> dict[str, Family]:
    from zoo import (
        blind,
        crossed,
        dense,
        experts,
        hybrid,
        layernorm,
        mixed,
        omni,
        readers,
        sight,
        singular,
        unrotated,
        vision,
    )

    release = Version(transformers.__version__)
    rows: dict[str, Family] = {}
    for module in (
        dense,
        layernorm,
        experts,
        hybrid,
        singular,
        unrotated,
        vision,
        sight,
        readers,
        mixed,
        omni,
        blind,
        crossed,
    ):
        for name, family in module.FAMILIES.items():
            if name in rows:
                raise ValueError(f"family {name!r} stands twice in the zoo")
            known = family.model_type in CONFIG_MAPPING
            early = family.since is not None and release < Version(family.since)
            if known and not early and hasattr(transformers, family.model_class):
                rows[name] = family
    return rows


FAMILIES = _families()
