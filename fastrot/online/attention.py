"""R3: queries rotated by the attention function, keys on their way into the cache.

Both come after RoPE. A key is rotated once, when it is new, so a cache holds rotated keys only.
The state lies on the attention module; the functions here hold none.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""The attention implementations around which R3 can be put."""

PREFIX = "fastrot_"
CACHE_NAMES = ("past_key_values", "layer_past")


def check_attention(name: str, module: Any) -> None:
    """Refuse an attention module in which R3 can't stand between RoPE and the cache."""
    code = inspect.unwrap(type(module).forward).__code__
    on_interface = "get_interface" in code.co_names and "update" in code.co_names
    if not on_interface or cache_name(module) is None:
        raise ValueError(
            f"{name} ({type(module).__name__}) does not use transformers' attention interface and "
            "cache, so R3 can't rotate its queries and keys after RoPE; leave R3 out"
        )
    implementation = str(module.config._attn_implementation)
    if implementation.removeprefix(PREFIX) not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name} uses attention implementation {implementation!r}; R3 works with eager, sdpa "
            "and flex_attention: call model.set_attn_implementation('sdpa') first"
        )


def cache_name(module: nn.Module) -> str | None:
    """What an attention module calls its cache."""
    code = inspect.unwrap(type(module).forward).__code__
    return next((name for name in CACHE_NAMES if name in code.co_varnames), None)


def attention_forward(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function ``base``, with the queries rotated where a module asks for it."""

    def forward(
        module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        rotation = getattr(module, "fastrot_q_attn", None)
        if rotation is not None:
            query = rotation(query)
        if base == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[base]
        return function(module, query, *args, **kwargs)

    return forward


class KeyRotatingCache:
    """Stands before a cache, for one call of one attention module, and rotates the new keys.

    Without a cache it hands the rotated keys back. Everything else is the cache's own.
    """

    def __init__(self, cache: Any, rotation: nn.Module):
        self.cache = cache
        self.rotation = rotation

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As ``transformers.Cache.update``: keys ``(batch, kv_heads, length, head_dim)``."""
        key_states = self.rotation(key_states)
        if self.cache is None:
            return key_states, value_states
        return self.cache.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers.Cache.get_seq_length``: the keys that are cached, 0 without a cache."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def rotate_keys(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention module.

    Raises:
        RuntimeError: the attention implementation was changed to one that leaves the queries
            unrotated.
    """
    implementation = module.config._attn_implementation
    if hasattr(module, "fastrot_q_attn") and not implementation.startswith(PREFIX):
        raise RuntimeError(
            f"R3 rotates the keys of this {type(module).__name__}, but attention implementation "
            f"{implementation!r} would not rotate the queries; call "
            f"model.set_attn_implementation({PREFIX + implementation!r})"
        )
    rotation = module.fastrot_k_cache
    cache = KeyRotatingCache(kwargs.get(rotation.cache_name), rotation)
    return args, {**kwargs, rotation.cache_name: cache}
