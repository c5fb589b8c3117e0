"""Who does what, if several processes rotate one checkpoint: decided by each alone, alike."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastrot.checkpoint.outputs import OutputFile
from fastrot.errors import RotationError

LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "WORLD_SIZE"),  # torchrun, accelerate launch
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"),  # srun; a batch script alone is no step
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_SIZE"),  # MPICH and others
)
"""Variables of launchers that tell rank and count, and one that is there only if they count."""


RESTARTED = "TORCHELASTIC_RUN_ID"
"""A variable of the launcher that starts all workers anew if one is lost."""


class Worker(NamedTuple):
    """One of several processes on one checkpoint.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        stays: until the checkpoint is whole. torchrun can't replace a lost worker any more once
            those of another machine have ended.
    """

    rank: int = 0
    size: int = 1
    stays: bool = False


def worker_of(environment: Mapping[str, str] | None = None) -> Worker:
    """The place among its like that a launcher gave this process, through its environment.

    Raises:
        RotationError: the variables make no sense.
    """
    given = os.environ if environment is None else environment
    for rank, count, sign in LAUNCHERS:
        if sign in given and rank in given and count in given:
            found = parse_worker(f"{given[rank]}/{given[count]}", f"{rank}/{count}")
            if found.size > 1:  # one alone may be a task of an array
                return found._replace(stays=RESTARTED in given)
    array = "SLURM_ARRAY_TASK_"
    if f"{array}ID" in given and f"{array}COUNT" in given:
        try:
            place = int(given[f"{array}ID"]) - int(given.get(f"{array}MIN", 0))
            place //= int(given.get(f"{array}STEP", 1))
        except (ValueError, ZeroDivisionError) as error:
            raise RotationError(f"{array}ID={given[f'{array}ID']}: {error}") from error
        return parse_worker(f"{place}/{given[f'{array}COUNT']}", f"{array}ID/{array}COUNT")
    return Worker()


def parse_worker(text: str, name: str = "--worker") -> Worker:
    """A worker as ``I/N``, I from 0 to N - 1.

    Raises:
        RotationError: it is none.
    """
    rank, _, count = text.partition("/")
    if not rank.isdecimal() or not count.isdecimal() or int(rank) >= int(count):
        raise RotationError(f"{name} {text}: expected I/N with I from 0 to N - 1")
    return Worker(int(rank), int(count))


def share(files: Sequence[OutputFile], worker: Worker) -> list[OutputFile]:
    """The files that fall to a worker: the largest first, each to whoever has least so far."""
    loads = [0] * worker.size
    mine = []
    for file in sorted(files, key=lambda file: (-file.nbytes, file.name)):
        rank = loads.index(min(loads))
        loads[rank] += file.nbytes
        if rank == worker.rank:
            mine.append(file)
    return sorted(mine, key=lambda file: file.name)
