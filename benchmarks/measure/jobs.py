"""One case at a time: check, then time. Each job is a dict and is answered by one."""

from collections.abc import Callable
from typing import Any

import torch

from measure.cases import DTYPES, Job
from measure.device import device, import_fastrot, machine_facts
from measure.models import apply_job, llm_compressor_job
from measure.operator import Data, Operator
from measure.operators import OPERATORS
from measure.oracle import errors, verdict
from measure.timing import Run, timed


def attempt(run: Callable[[], Job]) -> Job:
    """The answer, or the error in its place."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def make(job: Job, inputs: int) -> Data:
    """Random inputs, the same for every job of a size."""
    n, dim, generator = job["n"], job["dim"], torch.Generator(device()).manual_seed(job["n"])
    shape = (job["rows"], n) if dim else (n, job["rows"])
    options: Any = {"dtype": DTYPES[job["dtype"]], "device": device(), "generator": generator}
    x = tuple(torch.randn(shape, **options) for _ in range(inputs))
    signs = None
    if job["signs"]:
        bits = torch.randint(0, 2, (n,), device=device(), generator=generator)
        signs = (2 * bits - 1).to(torch.int8)
    return Data(x, signs, dim)


def kernel_job(job: Job) -> Job:
    """Check one case, then time it beside a clone and the peers."""
    operator = OPERATORS[job["kernel"]]
    data = make(job, operator.inputs)
    if job.get("warm"):
        operator.call(data)
        return {"status": "ok"}
    runs = operator.pipelines(data)
    found, failed = check(operator, data, runs)
    result = {**found["ours"], **verdict(found["ours"], job["dtype"])}
    if result["status"] == "wrong":
        return result
    x = data.x
    moved = x.numel() * operator.width(x.itemsize)

    def beside_clone() -> Job:
        ours = timed(lambda: operator.call(data), x.nbytes, moved)
        clone = timed(x.clone, x.nbytes, 2 * x.nbytes)
        percent = 100 * ours["gb_per_s"] / clone["gb_per_s"]
        return {**ours, "clone": clone, "percent_of_clone": percent}

    result |= attempt(beside_clone)
    result["peers"] = failed
    for name, run in runs.items():
        if name not in failed:
            answer = attempt(lambda run=run: timed(run, x.nbytes, moved))
            result["peers"][name] = {**found[name], **answer}
    return result


def check(operator: Operator, data: Data, runs: dict[str, Run]) -> tuple[dict[str, Job], Job]:
    """The errors of the operator (as ``"ours"``) and its peers, and which peers failed."""
    dtype = data.x.dtype
    copies = data._replace(inputs=tuple(x.clone() for x in data.inputs))
    # The allocator gives this block to the output: what the kernel leaves out is not a number.
    torch.full_like(data.x, float("nan"))
    outputs = {"ours": operator.values(operator.call(copies))}
    failed = {}
    for name, run in runs.items():
        answer = attempt(lambda run=run: {"output": operator.values(run())})
        if "failed" in answer:
            failed[name] = answer
        else:
            outputs[name] = answer["output"]
    found = errors(
        outputs,
        exact=lambda rows: operator.exact(tuple(map(rows, data.inputs)), data.signs),
        rounded=lambda exact: operator.rounded(exact, dtype),
        eps=torch.finfo(dtype).eps,
        dim=data.dim,
    )
    return found, failed


JOBS: dict[str, Callable[[Job], Job]] = {
    **dict.fromkeys(OPERATORS, kernel_job),
    "apply": apply_job,
    "llm-compressor": llm_compressor_job,
    "machine": lambda _: machine_facts(),
}


def do(job: Job) -> Job:
    """One job, in this process."""
    import_fastrot()
    return JOBS[job["kernel"]](job)
