"""Rotated checkpoints in vLLM: a plugin that serves the online rotations of a record.

vLLM calls :func:`register` in every process, before it reads a model's configuration. Importing
this package imports no vLLM.
"""


def register() -> None:
    """Make vLLM know checkpoints with online rotations: entry point ``vllm.general_plugins``."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from fastrot.integrations.vllm.config import FastrotConfig
    from fastrot.integrations.vllm.start import watch_models, watch_start
    from fastrot.record import QUANT_METHOD

    register_quantization_config(QUANT_METHOD)(FastrotConfig)
    watch_start()
    watch_models()
