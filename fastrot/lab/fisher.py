"""How much a model's loss minds noise inside: one forward and one backward pass over a text.

To second order, noise ``e`` at a place costs ``½ eᵀ F e``, with ``F`` the Fisher information there:
the mean of ``g gᵀ`` over gradients ``g`` of the loss for targets that the model itself draws.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError

STREAM = ("attention", "mlp")
"""Sites behind the norms of the residual stream."""


def descend_from_own_words(model: Any, window: Tensor, generator: torch.Generator) -> None:
    """Run a model on a text and back, from the summed loss of targets that it draws itself.

    Args:
        model: a causal language model, inside :func:`only_activations`; hooks see the gradients.
        window: token ids, ``(1, length)``.
        generator: of the targets, on the CPU.

    Raises:
        RotationError: logits that are not finite.
    """
    with torch.enable_grad():
        logits = model(input_ids=window.to(model.device)).logits[0].float()
        # The gradient of the summed cross entropy: the odds, less one at what was drawn.
        gradient = logits.detach().softmax(-1)
        if not gradient.isfinite().all():
            raise RotationError(
                f"the logits of {type(model).__name__} are not finite, so no words can be drawn; "
                "are there NaN or infinite weights?"
            )
        drawn = torch.multinomial(gradient.cpu(), 1, generator=generator).to(logits.device)
        gradient.scatter_add_(-1, drawn, torch.full_like(drawn, -1, dtype=gradient.dtype))
        logits.backward(gradient)


class Charged:
    """Which tensors have their gradient looked at: blocks side by side read one at two sites.

    Its gradient is that of all who read it, so it counts once.
    """

    def __init__(self) -> None:
        self._last: dict[int, weakref.ref[Tensor]] = {}

    def before(self, site: str, layer: int, x: Tensor) -> bool:
        """Whether the other site that reads the stream in a layer has seen this tensor already."""
        if site not in STREAM:
            return False
        last = self._last.get(layer)
        self._last[layer] = weakref.ref(x)
        return last is not None and last() is x


@contextmanager
def only_activations(model: Any) -> Iterator[None]:
    """Let gradients flow through the activations, and to no weight."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(
        # A copy, since some models write into it.
        lambda module, args, output: output.requires_grad_().clone()
    )
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in asked:
            parameter.requires_grad_()
