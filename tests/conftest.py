"""Settings of every test process."""

import os

# Triton decides when it is first imported; real kernels are compiled in processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

# The matrices are tiny: a second thread would only wait.
torch.set_num_threads(1)
