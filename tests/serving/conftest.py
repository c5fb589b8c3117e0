"""Servers: `make test-serving` runs these in an environment of their own, all others pass by."""

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

# Servers spawn their workers, which inherit this.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    # The controls send functions to the workers.
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",
)
