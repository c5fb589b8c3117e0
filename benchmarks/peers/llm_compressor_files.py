"""Rotate the checkpoint of the first argument into the second, as one does it with llm-compressor.

Runs in a virtual environment of its own: `pip install torch==2.13.0 llmcompressor==0.14.0`.
"""

import sys

from llmcompressor.core import State
from llmcompressor.modifiers.transform import SpinQuantModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load it whole, fold R1 and R2 into the weights, save it."""
    source, target = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    modifier = SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
    state = State(model=model)
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    model.save_pretrained(target)


if __name__ == "__main__":
    main()
