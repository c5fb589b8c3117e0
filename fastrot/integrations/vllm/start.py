"""Where fastrot sees what vLLM shows no plugin: how a model starts, and the model it built."""

import functools
from typing import Any

from fastrot.errors import RotationError
from fastrot.integrations.vllm.adapters import watch_adapters
from fastrot.integrations.vllm.recorded import DELEGATED, check_ranks, exported, split_sites
from fastrot.record import QUANT_METHOD, has_online


def check_start(model: Any, parallel: Any) -> None:
    """Refuse to start a server that could not compute what the record asks for.

    Args:
        model: vLLM's ``ModelConfig``.
        parallel: its ``ParallelConfig``.

    Raises:
        RotationError: config.json has the mark of no tool that we know, or tensor parallelism cuts
            a block in two.
    """
    if not has_online(model.hf_config):
        return
    if model.quantization in DELEGATED and exported(
        model.hf_config, model.hf_config.quantization_config
    ):
        return
    if model.quantization != QUANT_METHOD:
        raise RotationError(
            f"the record of {model.model} has online rotations, but quantization is "
            f"{model.quantization!r}, with which vLLM would leave them out; serve it with the "
            "quantization_config that it was written with, or quantize with one of "
            f"{', '.join(DELEGATED)}"
        )
    if parallel.tensor_parallel_size > 1:
        check_ranks(split_sites(model.hf_config), parallel.tensor_parallel_size)


def watch_start() -> None:
    """Let :func:`check_start` see every model: vLLM shows a plugin no parallel configuration."""
    from vllm.config import ModelConfig

    verify = ModelConfig.verify_with_parallel_config
    if hasattr(verify, "fastrot"):
        return

    @functools.wraps(verify)
    def verified(self: Any, parallel_config: Any) -> None:
        verify(self, parallel_config)
        check_start(self, parallel_config)

    verified.fastrot = True  # type: ignore[attr-defined]
    ModelConfig.verify_with_parallel_config = verified


def watch_models() -> None:
    """Let a :class:`FastrotConfig` see its model when it is built, whatever loads the weights."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import utils

    from fastrot.integrations.vllm.config import FastrotConfig

    # What vLLM does last to every model that it builds.
    record = utils.record_metadata_for_reloading
    if hasattr(record, "fastrot"):
        return

    @functools.wraps(record)
    def recorded(model: Any) -> None:
        vllm_config = get_current_vllm_config()
        config = vllm_config.quant_config
        if isinstance(config, FastrotConfig):
            config.rotate_built(model)
            if vllm_config.lora_config is not None:
                watch_adapters()
        record(model)

    recorded.fastrot = True  # type: ignore[attr-defined]
    utils.record_metadata_for_reloading = recorded
