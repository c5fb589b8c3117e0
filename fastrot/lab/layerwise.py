"""Gradients layer by layer, so that the graph of one decoder layer is in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

from torch.utils.checkpoint import checkpoint

from fastrot.lab.cache import WatchedCache
from fastrot.lab.quantized import decoder_layers


@contextmanager
def layerwise(model: Any) -> Iterator[None]:
    """Let every layer of a decoder keep its inputs alone, and run again on the way back.

    transformers' own gradient checkpointing is for training and leaves out the cache, through which
    keys and values are seen here. Hooks inside a layer are called in both runs; hooks on tensors
    get the gradient once, those of the first run.

    Args:
        model: a causal language model that draws no random numbers, inside
            :func:`fastrot.lab.cache.watched` when it runs.
    """
    with ExitStack() as stack:
        for layer in decoder_layers(model).values():
            own = vars(layer).get("forward")
            layer.forward = _twice(layer.forward)
            if own is None:
                stack.callback(delattr, layer, "forward")
            else:
                stack.callback(setattr, layer, "forward", own)
        yield


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        caches = {cache: cache.layers for cache in given if isinstance(cache, WatchedCache)}

        def run(*args: Any, **kwargs: Any) -> Any:
            for cache, layers in caches.items():  # both runs find it as it was
                cache.layers = [copy(layer) for layer in layers]
            return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return kept
