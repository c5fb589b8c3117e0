"""Settings of every test process."""

import gc
import os

import torch

# Triton decides when it is first imported; with a GPU at hand the kernels run on it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The matrices are tiny: a second thread would only wait.
torch.set_num_threads(1)


def pytest_collection_finish():
    """Half a million objects of imports: fastrot and the collector need not walk them each time.

    Nor what numba makes when the first kernel is compiled.
    """
    import fastrot

    fastrot.hadamard_transform(torch.ones(1, 2), impl="cpu")
    gc.collect()
    gc.freeze()
