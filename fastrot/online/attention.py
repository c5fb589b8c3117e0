"""R3: queries are rotated by the attention function, keys on their way into the cache.

Both come after RoPE. A key is rotated once, when it is new, so a cache holds rotated keys only;
where no cache takes the keys, the attention function rotates them. Keys that a layer lends to
others are lent rotated. What an attention module calls its cache does not matter: the cache is
known by its type. The state lies on the attention module; the functions here hold none.
"""

import functools
import inspect
import sys
from collections.abc import Callable, MutableMapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastrot.errors import RotationError
from fastrot.online.view import refuse_replica

if TYPE_CHECKING:
    from transformers import Cache, EncoderDecoderCache
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "paged|eager", "paged|sdpa")
"""The attention implementations around which R3 can stand; the paged ones are for batches."""

KEYS = "fastrot_keys"
NO_CACHE = (Tensor, bool, int, str, tuple)
"""What else an attention module gets; asked first, since it is most."""


def check_attention(name: str, module: Any) -> None:
    """Refuse an attention module in which R3 can't stand between RoPE and the cache."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not passes_on or not _asks_interface(type(module)):
        raise RotationError(
            f"{name} ({type(module).__name__}) does not use transformers' attention interface, so "
            "R3 can't rotate its queries and keys after RoPE; leave R3 out"
        )
    implementation = str(module.config._attn_implementation)
    if implementation not in IMPLEMENTATIONS:
        raise RotationError(
            f"{name} uses attention implementation {implementation!r}; R3 works with eager, sdpa "
            "and flex_attention: call model.set_attn_implementation('sdpa') first, or load with "
            "attn_implementation='sdpa'"
        )


def _asks_interface(attention: type) -> bool:
    """Whether a class' forward gets its attention function from a :func:`rotating_interface`.

    A forward that calls ``super().forward`` stands for the one that it inherits.
    """
    from transformers import AttentionInterface

    for owner in attention.__mro__:
        forward = inspect.unwrap(vars(owner)["forward"]) if "forward" in vars(owner) else None
        if isinstance(forward, FunctionType):
            home, names = sys.modules.get(forward.__module__), forward.__code__.co_names
            for found in (getattr(home, name, None) for name in names):
                if isinstance(found, AttentionInterface):
                    return "get_interface" in names and hasattr(found.get_interface, "fastrot")
            if "__class__" not in forward.__code__.co_freevars:
                return False
    return False


class Keys:
    """The new keys of one call of an attention module.

    Attributes:
        rotation: rotates them.
        cached: whether they came out of a cache, which got them rotated.
    """

    def __init__(self, rotation: nn.Module):
        self.rotation = rotation
        self.cached = False
        self._given: Tensor | None = None
        self._turned: Tensor | None = None

    def rotated(self, key: Tensor) -> Tensor:
        """What attention works with: ``key`` rotated, once however often it is asked for."""
        if self.cached:
            return key
        if self._turned is None or key is not self._given:
            self._given, self._turned = key, self.rotation(key)
        return self._turned


def rotating_interface(get_interface: Callable[..., Any]) -> Callable[..., Any]:
    """``AttentionInterface.get_interface``, so that what it returns rotates where a module asks.

    Every attention function passes there, ``eager`` too, whatever its name; modules without R3 pay
    for two look-ups.
    """

    @functools.wraps(get_interface)
    def get(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(_attend, get_interface(self, *args, **kwargs))

    get.fastrot = True  # type: ignore[attr-defined]
    return get


def _attend(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    rotations = getattr(module, "_modules", {})
    if "fastrot_q_attn" in rotations:
        query = rotations["fastrot_q_attn"](query)
    if "fastrot_k_cache" in rotations:
        keys: Keys | None = kwargs.pop(KEYS, None)
        if keys is None:
            raise RuntimeError(
                f"R3: the forward of this {type(module).__name__} was called directly, or keeps "
                "keyword arguments from its attention function, so its keys would not be rotated; "
                "call the module itself, or leave R3 out"
            )
        key = keys.rotated(key)
        # A paged cache of transformers 5.17 is updated by the function.
        kwargs = {name: _own(value) for name, value in kwargs.items()}
    return function(module, query, key, *args, **kwargs)


class KeyRotatingCache:
    """Stands before a cache, for one call of one attention module, and rotates the new keys.

    Everything else is the cache's own.
    """

    def __init__(self, cache: "Cache | PagedAttentionCache", keys: Keys):
        self.cache: Any = cache
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


class RotatedKeys:
    """Stands before the dict in which layers lend others ``(keys, values)``, for one such call.

    What is put in is rotated, unless it came out of a cache, so that who borrows it rotates only
    queries. Everything else is the dict's own.
    """

    def __init__(self, lent: MutableMapping[Any, Any], keys: Keys):
        self.lent: Any = lent
        self.keys = keys

    def __setitem__(self, name: Any, states: tuple[Tensor, Tensor]) -> None:
        key, value = states
        self.lent[name] = self.keys.rotated(key), value

    def __getitem__(self, name: Any) -> Any:
        return self.lent[name]

    def to(self, *args: Any, **kwargs: Any) -> "RotatedKeys":
        """Move what is lent, in place; accelerate does between layers."""
        self.lent.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lent, name)


def _own(value: Any) -> Any:
    return value.cache if isinstance(value, KeyRotatingCache) else value


def _rotating(value: Any, keys: Keys) -> Any:
    if value is None or isinstance(value, NO_CACHE):
        return value
    from transformers.cache_utils import Cache, EncoderDecoderCache
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    if isinstance(value, EncoderDecoderCache):
        return _rotating_pair(value, keys)
    if isinstance(value, (Cache, PagedAttentionCache)):
        return KeyRotatingCache(value, keys)
    return value


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
        RuntimeError: the attention implementation was changed to one that R3 does not know.
    """
    refuse_replica(module)
    implementation = module.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise RuntimeError(
            f"R3 is on this {type(module).__name__}, and works with eager, sdpa and "
            f"flex_attention, not with attention implementation {implementation!r}; call "
            "model.set_attn_implementation('sdpa')"
        )
    keys = Keys(module.fastrot_k_cache)
    lends = getattr(module, "store_full_length_kv", False)

    def rotating(value: Any) -> Any:
        if lends and isinstance(value, MutableMapping):
            return RotatedKeys(value, keys)
        return _rotating(value, keys)

    named = {name: rotating(value) for name, value in kwargs.items()}
    return tuple(rotating(value) for value in args), {**named, KEYS: keys}
