"""``fastrot.rotate_checkpoint``: from one folder to another, in bounded memory."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from fastrot.checkpoint.device import CPU, device_of, free_on, is_apart
from fastrot.checkpoint.drafts import Drafts
from fastrot.checkpoint.job import prepare
from fastrot.checkpoint.options import check_process
from fastrot.checkpoint.outputs import Job, OutputFile
from fastrot.checkpoint.panels import Room, needs
from fastrot.checkpoint.pipeline import Pipeline
from fastrot.checkpoint.store import Store
from fastrot.checkpoint.target import check_target, exact, readable
from fastrot.checkpoint.tasks import Task
from fastrot.checkpoint.workers import Worker, share, worker_of
from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.recipe import Recipe

log = logging.getLogger("fastrot")

MEMORY = 2 << 30
"""Bytes of memory besides what Python and torch take, unless a weight needs more."""

PANEL = 1 << 26
"""Bytes that are worked on at a time of what may be cut."""

LEAST = 1 << 20
"""The same where memory is short."""

QUIET = 300.0
"""Seconds without news after which a worker that stays does what others have left."""


@dataclass(frozen=True)
class RotatedCheckpoint:
    """What :func:`rotate_checkpoint` did.

    Attributes:
        plan: of the model.
        complete: whether the target is there; else files are missing that fall to other workers.
        missing: how many those are.
        nbytes: what this process wrote.
    """

    plan: Plan
    complete: bool
    missing: int
    nbytes: int


@dataclass(frozen=True)
class Needs:
    """What the rotation of a checkpoint takes.

    Attributes:
        files: of weights that will be written.
        disk: their bytes.
        memory: the least of ``--memory``.
    """

    files: int
    disk: int
    memory: int

    def __str__(self) -> str:
        count = f"{self.files} file" + ("s" if self.files > 1 else "")
        return (
            f"{count} of weights, {readable(self.disk)} to write; --memory "
            f"{readable(self.memory)} or more, {readable(max(MEMORY, self.memory))} by default"
        )


def needs_of(
    source: str | Path,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    drafts: Drafts = "copy",
    shard: int | None = None,
) -> Needs:
    """What :func:`rotate_checkpoint` will need for a plan; reads headers and norms.

    The other arguments are those of :func:`rotate_checkpoint`.

    Raises:
        RotationError: the rotation is not possible, or a file is damaged.
        OSError: a file can't be read.
    """
    job = prepare(Path(source).resolve(), plan, dtype=dtype, drafts=drafts, shard=shard)
    disk = sum(len(file.head) + file.nbytes for file in job.files)
    return Needs(len(job.files), disk, _room(job, LEAST).least)


class Shares(NamedTuple):
    """How ``--memory`` is shared out, in bytes.

    Attributes:
        panels: of all panels in flight.
        scratch: of the kernels' scratch memory.
        most: of a panel of what may be cut.
    """

    panels: int
    scratch: int
    most: int


def shares_of(job: Job, memory: int | None = None) -> Shares:
    """Share out memory of the host, and as much of a GPU if the job is done there.

    Args:
        job: what is written.
        memory: the limit of panels and scratch memory together; None for what is enough.

    Raises:
        RotationError: the limit is too small for the largest weight, or the GPU for the limit.
    """
    limit = MEMORY if memory is None else memory
    most = max(LEAST, min(PANEL, limit // 8))
    room = _room(job, most)
    while memory is not None and room.least > memory and most > LEAST:
        most = max(LEAST, most // 2)
        room = _room(job, most)
    if memory is not None and room.least > memory:
        raise RotationError(
            f"--memory {exact(memory)} is not enough for the largest weight, which takes "
            f"{readable(room.panel)}, and {readable(room.kernels)} of scratch memory; give at "
            f"least {readable(room.least)}"
        )
    taken, free = max(limit, room.least), free_on(job.device)
    if free is not None and taken > free:
        least = readable(_room(job, LEAST).least)
        raise RotationError(
            f"{job.device} has {readable(free)} free, and --memory {readable(taken)} is also what "
            f"may be taken there; give less, but {least} or more, or --device cpu"
        )
    return Shares(max(limit - room.kernels, room.panel), room.scratch, most)


def _room(job: Job, most: int) -> Room:
    return needs(_tasks(job), job.norms, most, is_apart(job.device))


def rotate_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: Recipe | None = None,
    *,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    drafts: Drafts = "copy",
    shard: int | None = None,
    worker: Worker | None = None,
    device: str | torch.device = CPU,
    fresh: bool = False,
    progress: bool = False,
) -> RotatedCheckpoint:
    """Write a rotated copy of a checkpoint without loading the model.

    The result is that of :func:`fastrot.apply` on the loaded model, bit for bit (on a GPU to one
    rounding), but that every tensor keeps the dtype it has in the file. The target appears under
    its name when it is whole, or never; until then it grows in a folder beside it. Repeating a call
    that was interrupted or killed goes on where that stopped. The source is only read.

    Args:
        source: a checkpoint of transformers in safetensors.
        target: a new or an empty folder.
        recipe: the rotations; R1 and R2 by default.
        dtype: of floating-point tensors; None leaves them as they are.
        memory: bytes for weights that are worked on, and scratch memory; Python and torch take
            about 0.5 GiB besides. The same is the limit on a GPU, where the scratch memory lies and
            the weights a second time. None takes 2 GiB, or what the largest weight needs.
        drafts: what to do with tensors of multi-token prediction, which transformers does not
            load: ``copy`` them as they are, which is exact without R1 or with ``keep_head``, or
            ``drop`` them.
        shard: bytes of a file of weights; None keeps the files of the source.
        worker: which of several processes this is; None asks torchrun, srun, SLURM or MPI through
            the environment. Every worker does some files; the last to finish completes the target.
            Under torchrun all stay until then, so that it can start a lost one anew.
        device: where weights are rotated: the CPU, or a GPU; ``cuda`` is the launcher's local rank
            modulo the number of GPUs. All workers and repetitions need one kind of device.
        fresh: throw away what an earlier call for this target left unfinished.
        progress: show a bar of the whole job, on the first worker.

    Raises:
        RotationError: the rotation is not possible, the device is not there or too small, a file is
            damaged, a tensor is missing, left over or not finite, or the unfinished target is of
            another rotation or kind of device.
        TypeError: an argument of the wrong type.
        OSError: a file can't be read or written, or there is no room.
    """
    check_process(memory, worker)
    source, target = Path(source).resolve(), Path(target).resolve()
    mine = worker_of() if worker is None else worker
    place = device_of(device)
    if fresh and mine.size > 1:
        raise RotationError(
            "several workers can't each start afresh: remove the unfinished folder, or run one "
            "worker with --fresh first"
        )
    taken = occupied(source, target)
    job = prepare(source, recipe or Recipe(), dtype=dtype, drafts=drafts, shard=shard, device=place)
    return write(job, target, taken, worker=mine, memory=memory, fresh=fresh, progress=progress)


def occupied(source: Path, target: Path) -> FileExistsError | None:
    """Check a target before any work, see :func:`check_target`.

    Returns:
        Why it can't be written to, if a checkpoint is there, which may be the result.
    """
    try:
        check_target(source, target)
    except FileExistsError as error:
        if not (target / "config.json").is_file():
            raise
        return error
    return None


def write(
    job: Job,
    target: Path,
    taken: FileExistsError | None = None,
    *,
    worker: Worker,
    memory: int | None = None,
    fresh: bool = False,
    progress: bool = False,
) -> RotatedCheckpoint:
    """Do a job, or this worker's share of it, as :func:`rotate_checkpoint` describes.

    Args:
        job: what is written.
        target: a new or an empty folder, resolved.
        taken: what :func:`occupied` said of it, which is raised unless the result is there.
        worker: which of several processes this is.
        memory: bytes for weights that are worked on, and scratch memory.
        fresh: throw away what an earlier call for this target left unfinished.
        progress: show a bar of the whole job, on the first worker.
    """
    store = Store(job, target)
    if store.published():
        store.tidy()
        return RotatedCheckpoint(job.plan, True, 0, 0)
    if taken is not None:
        raise taken
    shares = shares_of(job, memory)
    store.open(fresh)
    todo = store.missing(share(job.files, worker))
    bar = _Bar(job, store, progress and worker.rank == 0)

    def write(files: list[OutputFile]) -> None:
        Pipeline(
            files,
            job.norms,
            store.part_of,
            bar.finish,
            device=job.device,
            memory=shares.panels,
            scratch=shares.scratch,
            most=shares.most,
            progress=bar.update,
        ).run()

    try:
        write(todo)
        complete = store.publish()
        while worker.stays and not complete:
            if not store.wait(QUIET):
                late = store.missing(job.files)
                log.warning("nothing has grown for %g s; writing what others left", QUIET)
                write(late)
                todo = [*todo, *late]
            complete = store.publish()
    except BaseException as error:
        # Another worker may have completed the target, and taken the folder away.
        complete = isinstance(error, FileNotFoundError) and store.published()
        if complete:
            return RotatedCheckpoint(job.plan, True, 0, sum(file.nbytes for file in todo))
        if worker.size == 1:
            store.discard()
        whole = len(job.files) - len(store.missing(job.files))
        if whole:
            log.warning("%s of %s files are whole; the same call goes on", whole, len(job.files))
        raise
    finally:
        bar.close()
    missing = 0 if complete else len(store.missing(job.files))
    if missing and worker.size == 1:
        raise RotationError(
            f"{missing} files in {store.folder} were changed or removed meanwhile; the same call "
            "writes them again"
        )
    return RotatedCheckpoint(job.plan, complete, missing, sum(file.nbytes for file in todo))


def _tasks(job: Job) -> list[Task]:
    return [task for file in job.files for task in file.tasks]


class _Bar:
    """Progress of all workers: of this one as it writes, of others as their files are whole."""

    def __init__(self, job: Job, store: Store, shown: bool):
        self._job, self._store = job, store
        self._bar = None
        if shown:
            self._bar = tqdm(
                total=job.nbytes, desc="writing", unit="B", unit_scale=True, unit_divisor=1024
            )
            self._recount()

    def update(self, nbytes: int) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):  # a terminal that has gone is no reason to stop
                self._bar.update(nbytes)

    def finish(self, file: OutputFile, part: Path) -> None:
        self._store.finish(file, part)
        self._recount()

    def _recount(self) -> None:
        if self._bar is not None:
            left = sum(file.nbytes for file in self._store.missing(self._job.files))
            with suppress(OSError, ValueError):
                self._bar.update(self._job.nbytes - left - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
