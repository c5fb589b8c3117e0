"""How long something takes on a GPU."""

import time
from collections.abc import Callable
from typing import Any

import torch

from measure.cases import Job
from measure.device import interpreted

Run = Callable[[], Any]


def timed(run: Run, nbytes: int, moved: float) -> Job:
    """Median, 90th percentile and bandwidth.

    What a launch from Python would hide, a CUDA graph shows. The cache is flushed before each
    repetition, but for tensors that a cache would hold anyway.

    Args:
        run: what is timed.
        nbytes: size of its input, which decides how it is timed.
        moved: bytes that it has to read and write.

    Returns:
        ``median_ms``, ``p90_ms``, ``gb_per_s`` and ``how``: what stands between it and the clock.
    """
    if interpreted():
        start = time.perf_counter()
        run()
        how, times = "interpreter", [1e3 * (time.perf_counter() - start)] * 2
    else:
        from triton.testing import do_bench, do_bench_cudagraph

        quantiles = (0.5, 0.9)
        if nbytes < 4 << 20:
            how, times = "graph of many, warm L2", do_bench_cudagraph(run, quantiles=quantiles)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            how = "graph of one, flushed L2"
            times = do_bench(graph.replay, warmup=10, rep=60, quantiles=quantiles)
    median, p90 = times
    return {"median_ms": median, "p90_ms": p90, "gb_per_s": moved / median / 1e6, "how": how}
