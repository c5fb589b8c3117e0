"""Adapters whose weights are loaded onto a rotated model.

Those that were trained on the unrotated model have the same names and shapes and compute nonsense.
Their files only tell the name of the model they were trained on.
"""

import warnings
from typing import Any


def note(model: Any, adapter: str) -> None:
    """Warn, unless the adapter names a rotated checkpoint, that of this very model.

    Args:
        model: of PEFT, or one of transformers with adapters in it; rotated.
        adapter: the name of the adapter that gets its weights.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(model, "peft_config", {}).get(adapter)
    trained_on = getattr(config, "base_model_name_or_path", None)
    if trained_on and trained_on == base.name_or_path and _is_rotated(trained_on):
        return
    warnings.warn(
        f"adapter {adapter!r} is loaded onto a rotated model, and was trained on "
        f"{trained_on or 'a model without a name'}: if that was not rotated alike, the result is "
        "nonsense; merge it into the unrotated model first (merge_and_unload), then rotate",
        stacklevel=5,
    )


def _is_rotated(name: str) -> bool:
    """Whether a checkpoint on this machine has a record."""
    from transformers import PreTrainedConfig

    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return settings.get("fastrot") is not None
