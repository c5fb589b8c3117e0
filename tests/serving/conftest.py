"""Servers: `make test-serving` runs these in an environment of their own, all others pass by."""

import os
from importlib.util import find_spec

import pytest

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


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """What the unrotated checkpoint of a family answers; each is served once."""
    from checkpoints import checkpoint
    from engine import served

    known = {}

    def answers_of(family):
        if family not in known:
            known[family] = served(checkpoint(tmp_path_factory.mktemp(family), family))
        return known[family]

    return answers_of
