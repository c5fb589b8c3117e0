"""Keys and values on their way into the cache: after RoPE, and after R3."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from fastrot.errors import RotationError
from fastrot.integrations.transformers import cache_argument

Watch = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a layer's number, its new keys and values ``(batch, kv_heads, length, head_dim)``: what the
cache takes in their place."""


class WatchedCache(DynamicCache):
    """A cache that shows what is new to some functions, and keeps what they return."""

    def __init__(self, model: Any, *watches: Watch) -> None:
        super().__init__(config=model.config)
        self.watches = list(watches)
        self.updates = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values; return all that the layer has."""
        for watch in self.watches:
            key_states, value_states = watch(layer_idx, key_states, value_states)
        self.updates += 1
        result: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return result


def _takes(model: Any, name: str) -> bool:
    """Whether a model takes a cache of transformers, and none of its own kind."""
    parameter = inspect.signature(type(model).forward).parameters.get(name)
    if parameter is None:
        return False
    kinds = get_args(parameter.annotation) or (parameter.annotation,)
    caches = [kind for kind in kinds if getattr(kind, "__name__", "").endswith("Cache")]
    return all(issubclass(WatchedCache, cache) for cache in caches)


@contextmanager
def watched(model: Any, watch: Watch, needed: bool = True) -> Iterator[None]:
    """Show the keys and values of every call of a model to ``watch``.

    A call without a cache gets one of its own; a :class:`WatchedCache` may be given, too.

    Args:
        model: of transformers.
        watch: sees what is new.
        needed: refuse models that put nothing into a cache; else nothing is seen of these.

    Raises:
        RotationError: the model takes no such cache; in a call, another one was given, or the model
            asked none for room.
    """
    name = next(iter(cache_argument(model, None)))
    if not _takes(model, name):
        if needed:
            raise RotationError(
                f"{type(model).__name__} keeps no keys and values in a cache of transformers; "
                "leave kv out"
            )
        yield
        return

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get(name)
        if cache is None:
            cache = WatchedCache(model)
        if not isinstance(cache, WatchedCache):
            raise RotationError(
                f"{name} is a {type(cache).__name__}, whose keys and values nobody would see while "
                "they are quantized or measured; leave it out, or give a WatchedCache"
            )
        if watch not in cache.watches:
            cache.watches.append(watch)
        caches[:] = [(cache, cache.updates)]
        return args, {**kwargs, name: cache, "use_cache": True}

    def after(module: nn.Module, args: Any, result: Any) -> None:
        cache, updates = caches.pop()
        if needed and cache.updates == updates:
            raise RotationError(
                f"{type(model).__name__} put no keys and values into its cache; leave kv out"
            )

    caches: list[tuple[WatchedCache, int]] = []
    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
