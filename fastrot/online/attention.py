"""R3: queries rotated by the attention function, keys on their way into the cache.

Both come after RoPE. A key is rotated once, when it is new, so a cache holds rotated keys only.
The state lies on the attention module; the functions here hold none.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""The attention implementations around which R3 can be put."""

PREFIX = "fastrot_"


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
    cache = KeyRotatingCache(kwargs.get("past_key_values"), module.fastrot_k_cache)
    return args, {**kwargs, "past_key_values": cache}
