"""The marks of online rotations in a configuration, which make transformers ask for fastrot."""

from typing import TYPE_CHECKING, Any

from fastrot.checks import quant_method
from fastrot.journal import Journal
from fastrot.record import QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GUARD = "experts_implementation"


def clear_stale_mark(model: "PreTrainedModel", config: Any, journal: Journal) -> None:
    """Take off the mark of a loader that dequantized (GGUF, fp8): such a model can't be saved.

    Args:
        model: its weights were found to be plain numbers.
        config: the model's own.
        journal: is told how each step is taken back.
    """
    if quant_method(config) in (None, QUANT_METHOD):
        return
    del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions", "is_quantized"):
        journal.delete(model, name)


def mark(config: Any) -> None:
    """Mark a configuration as that of a model with online rotations."""
    from fastrot.integrations.transformers import FastrotConfig

    config.quantization_config = FastrotConfig()
    setattr(config, GUARD, QUANT_METHOD)


def unmark(config: Any) -> None:
    """Take the marks of :func:`mark` away: no online rotation is left."""
    for name in ("quantization_config", GUARD):
        if hasattr(config, name):
            delattr(config, name)
