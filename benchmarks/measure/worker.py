"""Cases run in a process of their own: one that hangs or dies takes no other along."""

import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from measure.cases import Job
from measure.device import device, interpreted
from measure.jobs import attempt, do

LIMIT = {"apply": 120.0, "llm-compressor": 120.0}
"""Seconds until a job's process is ended; 60 for all others."""


def serve(connection: Any) -> None:
    """A worker: answers jobs until its process ends."""
    if interpreted():
        torch.set_num_threads(1)
    while True:
        job = connection.recv()
        answer = attempt(lambda job=job: do(job))
        gc.collect()
        if device() == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # after an illegal access nothing works any more
                answer = {"failed": str(error)[:500], "fatal": True}
        connection.send(answer | ({"status": "error"} if "failed" in answer else {}))


class Worker:
    """A process that can fail alone."""

    def __init__(self, target: Callable[[Any], None]):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def ask(self, job: Job, seconds: float) -> Job:
        """The answer; the process is gone if there was none."""
        try:
            self.connection.send(job)
            if self.connection.poll(seconds):
                answer: Job = self.connection.recv()
                if answer.pop("fatal", False):
                    self.end()
                return answer
            failed = f"no answer in {seconds:.0f} s"
        except (EOFError, OSError):
            failed = "the process died"
        self.end()
        return {"status": "error", "failed": failed}

    def end(self) -> None:
        """Whatever it does at the moment."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_all(
    jobs: Iterable[Job],
    deadline: float,
    record: Callable[[Job], None],
    target: Callable[[Any], None] = serve,
) -> None:
    """Run the jobs one after the other, each to its own end, until the deadline."""
    worker = None
    for job in jobs:
        left = deadline - time.monotonic()
        if left <= 0:
            record({**job, "status": "skipped", "failed": "out of time"})
            continue
        if worker is None or not worker.process.is_alive():
            worker = Worker(target)
        seconds = min(left, LIMIT.get(job["kernel"], 60.0))
        record({**job, **worker.ask(job, seconds)})
    if worker is not None and worker.process.is_alive():
        worker.end()


def compile_ahead(jobs: Iterable[Job], deadline: float, processes: int) -> None:
    """Fill Triton's cache on disk, in parallel: compiling would take longer than measuring.

    Few rows are enough: sizes enter the machine code by what divides them, and whether they are 1.
    """
    small = {
        json.dumps({**job, "rows": min(job["rows"], 4096), "warm": True}): None
        for job in jobs
        if "rows" in job
    }
    unique = [json.loads(job) for job in small]
    shares = [unique[start::processes] for start in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        for share in shares:
            pool.submit(run_all, share, deadline, lambda _: None)
