"""vLLM alone on a folder, `python stock.py FOLDER`: prints what engine.answers returns, as JSON.

No plugin is loaded, and fastrot is never imported. What vLLM has for CUDA only is computed here by
what its documentation says of it: the kernel for Hadamard matrices, and the product with a matrix.
"""

import json
import os
import sys

import torch

os.environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm.model_executor.layers.quantization.compressed_tensors.transform import module as transform


def sylvester(x, inplace):
    """The kernel for the last dimension, a power of two: ``x H/√n``."""
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return x @ matrix / x.shape[-1] ** 0.5


transform.ops.hadacore_transform = sylvester
transform.dispatch_unquantized_gemm = lambda: lambda layer, x, weight, bias: x @ weight.T


def transforms(model):
    """The types of the matrices by which vLLM itself rotates, one for each layer."""
    found = [m for m in model.modules() if isinstance(m, transform.HadamardTransform)]
    return [scheme.scheme.type for layer in found for scheme in layer.transforms.values()]


if __name__ == "__main__":
    from engine import answers, engine

    with engine(sys.argv[1]) as llm:
        kinds = llm.apply_model(transforms)[0]
        got = answers(llm)
        llm.apply_model(
            lambda model: setattr(transform.HadamardTransform, "forward", lambda _, x: x)
        )
        without = answers(llm)
    assert "fastrot" not in sys.modules
    said = {"kinds": kinds, "without": without.tokens, "tokens": got.tokens}
    said |= {"logprobs": got.logprobs.tolist(), "scores": got.scores.tolist()}
    print(json.dumps(said))
