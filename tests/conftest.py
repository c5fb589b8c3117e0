"""Settings of every test process."""

import gc
import itertools
import os

import torch

# Triton decides when it is first imported; with a GPU at hand the kernels run on it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The matrices are tiny: a second thread would only wait.
torch.set_num_threads(1)


EACH = 20
"""Tests between two looks at what has gathered."""


def pytest_collection_finish(session):
    """Let numba make what it makes when the first kernels are compiled."""
    import fastrot

    for dtype in (torch.float32, torch.float64):
        fastrot.hadamard_transform(torch.ones(1, 2, dtype=dtype), impl="cpu")
    session.tests_begun = itertools.count()


def pytest_runtest_setup(item):
    """The same numbers for a test wherever and in whatever order it runs.

    And half a million objects of imports: fastrot and the collector need not walk them each time.
    Nor what compilers, and libraries with a cache, keep after a test.
    """
    torch.manual_seed(0)  # what fails, fails again
    if next(item.session.tests_begun) % EACH == 0:
        gc.collect()
        gc.freeze()
