"""LoRA of linear layers whose input is rotated online.

An adapter of a rotated model was trained on the rotated input ``x Q``, since in PEFT it stands
behind the rotation. vLLM gives it ``x``, and calls the quantization method, which rotates, beside
it. So its first matrix ``A`` is replaced by ``A Qᵀ`` when it is loaded: ``x (A Qᵀ)ᵀ = (x Q) Aᵀ``,
and a step costs nothing.
"""

import functools
from typing import Any

from torch import Tensor

from fastrot.rotations.stages import multiply


def watch_adapters() -> None:
    """Let every layer with LoRA that vLLM makes from now on load what it needs."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    init = BaseLinearLayerWithLoRA.__init__
    if hasattr(init, "fastrot"):
        return

    @functools.wraps(init)
    def initialized(self: Any, base_layer: Any) -> None:
        init(self, base_layer)
        if hasattr(base_layer, "fastrot_input"):
            rotate_adapters(self, base_layer.fastrot_input)

    initialized.fastrot = True  # type: ignore[attr-defined]
    BaseLinearLayerWithLoRA.__init__ = initialized


def rotate_adapters(layer: Any, rotation: Any) -> None:
    """Let one of vLLM's layers with LoRA multiply what it loads by the transpose of a rotation.

    Args:
        layer: whose adapters come one by one, those of all ranks together.
        rotation: the :class:`fastrot.online.OnlineRotation` of its input.
    """
    set_lora = layer.set_lora
    stages = rotation.rotation.stages(rotation.value, not rotation.inverse)

    def turned(a: Tensor | None) -> Tensor | None:
        return None if a is None else multiply(a.to(rotation.operand.device), stages)

    def set_rotated(index: int, lora_a: Any, lora_b: Any) -> None:
        joined = isinstance(lora_a, list)  # of several layers that vLLM made one
        set_lora(index, [turned(a) for a in lora_a] if joined else turned(lora_a), lora_b)

    layer.set_lora = set_rotated
