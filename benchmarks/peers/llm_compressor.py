"""One rotation of the benchmark model by llm-compressor's SpinQuantModifier; prints its seconds.

Runs in a virtual environment of its own: `pip install torch==2.13.0 llmcompressor==0.14.0`.
"""

import json
import os
import sys
import time
from importlib.metadata import version

import torch
from llmcompressor.core import State
from llmcompressor.modifiers.transform import SpinQuantModifier
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Read the request from the first argument, a JSON object; write one JSON object."""
    request = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, request["dtype"]))
    model = LlamaForCausalLM(LlamaConfig(**request["config"])).eval()
    modifier = SpinQuantModifier(rotations=request["rotations"], transform_type="hadamard")
    state = State(model=model)
    torch.ones(int(os.environ["TOUCHED"]), dtype=torch.uint8)
    start = time.perf_counter()
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
