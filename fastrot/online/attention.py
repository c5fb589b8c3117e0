"""R3: queries are rotated by the attention function, keys on their way into the cache.

Both come after RoPE. A key is rotated once, when it is new, so a cache holds rotated keys only;
where no cache takes the keys, the attention function rotates them. What an attention module calls
its cache does not matter: the cache is known by its type. The state lies on the attention module;
the functions here hold none.
"""

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.online.view import viewed

if TYPE_CHECKING:
    from transformers import Cache, EncoderDecoderCache

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""The attention implementations around which R3 can be put."""

PREFIX = "fastrot_"
KEYS = "fastrot_keys"
SHARED_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def check_attention(name: str, module: Any) -> None:
    """Refuse an attention module in which R3 can't stand between RoPE and the cache."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not passes_on or _interface(type(module)) is None:
        raise RotationError(
            f"{name} ({type(module).__name__}) does not use transformers' attention interface, so "
            "R3 can't rotate its queries and keys after RoPE; leave R3 out"
        )
    implementation = str(module.config._attn_implementation)
    if implementation.removeprefix(PREFIX) not in IMPLEMENTATIONS:
        raise RotationError(
            f"{name} uses attention implementation {implementation!r}; R3 works with eager, sdpa "
            "and flex_attention: call model.set_attn_implementation('sdpa') first, or load with "
            "attn_implementation='sdpa'"
        )
    if getattr(module.config, "output_attentions", False):
        raise RotationError(
            f"{name} has output_attentions=True in its configuration, which transformers refuses "
            "to save beside the attention implementation that R3 needs; set "
            "config.output_attentions = False and pass output_attentions=True to the call"
        )


def _interface(attention: type) -> tuple[str, str] | None:
    """Where the attention interface lies that a class' forward calls: a module, and the name there.

    A forward that calls ``super().forward`` stands for the one that it inherits.
    """
    from transformers import AttentionInterface

    for owner in attention.__mro__:
        forward = inspect.unwrap(vars(owner)["forward"]) if "forward" in vars(owner) else None
        if isinstance(forward, FunctionType):
            home = sys.modules.get(forward.__module__)
            for name in forward.__code__.co_names:
                if isinstance(getattr(home, name, None), AttentionInterface):
                    return forward.__module__, name
            if "__class__" not in forward.__code__.co_freevars:
                return None
    return None


# As torch.compiler.assume_constant_result does, which would import the whole compiler for it.
_interface._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Keys:
    """The new keys of one call of an attention module.

    Attributes:
        rotation: rotates them.
        cached: whether they came out of a cache, which got them rotated.
    """

    def __init__(self, rotation: nn.Module):
        self.rotation = rotation
        self.cached = False


def attention_forward(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function ``base``, with queries and keys rotated where a module asks for it."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        module = viewed(module)
        keys: Keys | None = kwargs.pop(KEYS, None)
        if keys is None and hasattr(module, "fastrot_k_cache"):
            raise RuntimeError(
                f"R3: the forward of this {type(module).__name__} was called directly, or keeps "
                "keyword arguments from its attention function, so its keys would not be rotated; "
                "call the module itself, or leave R3 out"
            )
        if keys is not None and not keys.cached:
            key = keys.rotation(key)
        rotation = getattr(module, "fastrot_q_attn", None)
        if rotation is not None:
            query = rotation(query)
        home, interface = _interface(type(module)) or (type(module).__module__, SHARED_INTERFACE)
        if base == "eager":
            function = sys.modules[home].eager_attention_forward
        else:
            function = getattr(sys.modules[home], interface)[base]
        return function(module, query, key, *args, **kwargs)

    return forward


class KeyRotatingCache:
    """Stands before a cache, for one call of one attention module, and rotates the new keys.

    Everything else is the cache's own.
    """

    def __init__(self, cache: "Cache", keys: Keys):
        self.cache = cache
        self.keys = keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As ``transformers.Cache.update``: keys ``(batch, kv_heads, length, head_dim)``."""
        self.keys.cached = True
        key_states = self.keys.rotation(key_states)
        return self.cache.update(key_states, value_states, *args, **kwargs)

    @property
    def layers(self) -> Any:
        """As ``transformers.Cache.layers``, where cross attention reads the keys it cached."""
        self.keys.cached = True
        return self.cache.layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _rotating(value: Any, keys: Keys) -> Any:
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if isinstance(value, EncoderDecoderCache):
        return _rotating_pair(value, keys)
    return KeyRotatingCache(value, keys) if isinstance(value, Cache) else value


def _rotating_pair(pair: "EncoderDecoderCache", keys: Keys) -> Any:
    """The same for the two caches of a decoder with cross attention, which are told by their type.

    It is of that type, shares everything with ``pair`` but the caches, and rotates the new keys of
    both.
    """
    kind = type(pair)
    twin = kind.__new__(kind)
    for name, value in vars(pair).items():
        setattr(twin, name, _rotating(value, keys))
    return twin


def rotate_keys(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attention module.

    Raises:
        RuntimeError: the attention implementation was changed to one that rotates nothing.
    """
    implementation = module.config._attn_implementation
    if not implementation.startswith(PREFIX):
        raise RuntimeError(
            f"R3 rotates the keys of this {type(module).__name__}, but attention implementation "
            f"{implementation!r} would not rotate the queries; call "
            f"model.set_attn_implementation({PREFIX + implementation!r})"
        )
    keys = Keys(module.fastrot_k_cache)
    named = {name: _rotating(value, keys) for name, value in kwargs.items()}
    return tuple(_rotating(value, keys) for value in args), {**named, KEYS: keys}
