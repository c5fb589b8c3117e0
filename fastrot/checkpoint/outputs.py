"""The files of the new checkpoint: which tensor goes where, and what tells them from others."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrot.checkpoint.device import CPU, arithmetic_of
from fastrot.checkpoint.header import Entry, Layout, Metadata, header_of
from fastrot.checkpoint.tasks import Task
from fastrot.edits import Plan, Rotate

NEW = "model-fastrot.safetensors"
"""Where tensors go that the old checkpoint does not have, if it has several files."""

SEAL = "fastrot"
"""Metadata of every file: which rotation of which source wrote it."""


@dataclass(frozen=True)
class OutputFile:
    """A file of weights of the new checkpoint.

    Attributes:
        name: of the file.
        tasks: its tensors that are made of old ones.
        constants: its other tensors.
        metadata: what its header says besides.
    """

    name: str
    tasks: tuple[Task, ...]
    constants: Mapping[str, Tensor]
    metadata: Metadata

    @property
    def layouts(self) -> dict[str, Layout]:
        """All tensors in the order in which they lie."""
        made = {task.name: task.layout for task in self.tasks}
        return made | {
            name: Layout(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self.constants.items()
        }

    @property
    def head(self) -> bytes:
        """What stands before the tensors."""
        return header_of(self.layouts, self.metadata)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.nbytes for layout in self.layouts.values())


@dataclass(frozen=True)
class Job:
    """A rotation of a checkpoint.

    Attributes:
        source: the folder.
        plan: of the model.
        files: what will be written.
        norms: the weights of the norms that are folded, by the names of the model.
        config: the new config.json.
        digest: of everything that decides a byte of the result, but the source's own bytes.
        sources: size and time of the source's files, by name; these stand for the bytes.
        device: where weights are rotated.
    """

    source: Path
    plan: Plan
    files: tuple[OutputFile, ...]
    norms: Mapping[str, Tensor]
    config: dict[str, Any]
    digest: str
    sources: Mapping[str, list[int]]
    device: torch.device = CPU

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that will be written."""
        return sum(file.nbytes for file in self.files)


def files_of(
    tasks: Iterable[Task],
    constants: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    metadata: Mapping[Path, Metadata],
    shard: int | None,
) -> tuple[OutputFile, ...]:
    """Which tensor goes into which file: each where it was, or into files of at most ``shard``."""
    plain: Metadata = {"format": "pt"}
    meta = {file.name: found or plain for file, found in metadata.items()}
    several = len(meta) > 1
    ordered = sorted(tasks, key=lambda t: (t.source.file.name, t.source.offset, t.name))
    groups: dict[str, list[Task]] = {}
    if shard is None:
        for task in ordered:
            fresh = several and task.name not in entries
            groups.setdefault(NEW if fresh else task.source.file.name, []).append(task)
        if constants and several:
            groups.setdefault(NEW, [])
    else:
        parts: list[list[Task]] = [[]]
        filled = 0
        for task in ordered:
            if filled and filled + task.layout.nbytes > shard:
                parts.append([])
                filled = 0
            parts[-1].append(task)
            filled += task.layout.nbytes
        count = len(parts)
        for number, part in enumerate(parts, 1):
            name = f"model-{number:05}-of-{count:05}" if count > 1 else "model"
            groups[f"{name}.safetensors"] = part
    last = [*groups][-1]
    return tuple(
        OutputFile(name, tuple(g), constants if name == last else {}, meta.get(name, plain))
        for name, g in groups.items()
    )


def sealed_job(
    source: Path,
    plan: Plan,
    files: Sequence[OutputFile],
    norms: Mapping[str, Tensor],
    config: dict[str, Any],
    device: torch.device = CPU,
) -> Job:
    """The job whose files all carry a seal of it, of the source that it reads, and of rounding."""
    digest, states = _digest(plan, files, config), _states(files)
    sealed = repr((digest, states, arithmetic_of(device)))
    seal = hashlib.sha256(sealed.encode()).hexdigest()[:32]
    marked = (replace(file, metadata={**file.metadata, SEAL: seal}) for file in files)
    return Job(source, plan, tuple(marked), norms, config, digest, states, device)


def _states(files: Iterable[OutputFile]) -> dict[str, list[int]]:
    """Size and time of every file that is read: another source has others."""
    tasks = [task for file in files for task in file.tasks]
    sources = {task.stored.file for task in tasks}
    sources |= {task.coded.factors.file for task in tasks if task.coded is not None}
    found = {file.name: file.stat() for file in sorted(sources)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in found.items()}


def _digest(plan: Plan, files: Sequence[OutputFile], config: dict[str, Any]) -> str:
    """The last digits of random matrices differ between machines, so their bytes count."""
    found = hashlib.sha256(json.dumps([plan.to_dict(), config], sort_keys=True).encode())
    turns = (step for edit in plan.weights for step in edit.steps if isinstance(step, Rotate))
    dense = {turn.rotation: turn.rotation for turn in turns if turn.rotation.dense}
    for rotation in dense:
        assert rotation.operand is not None
        found.update(rotation.operand.numpy().tobytes())
    for file in files:
        found.update(repr((file.name, file.metadata, file.layouts, [*file.constants])).encode())
        for task in file.tasks:
            entry = task.source
            place = entry.name, entry.file.name, entry.offset, entry.shape, entry.dtype
            done = [
                (a.box, a.value, a.edit and [str(s) for s in a.edit.steps]) for a in task.actions
            ]
            found.update(repr((place, done, _coded(task))).encode())
    return found.hexdigest()


def _coded(task: Task) -> object:
    """What makes numbers of the codes of a quantized source."""
    if task.coded is None:
        return None
    factors = task.coded.factors
    return *task.coded.form, factors.name, factors.file.name, factors.offset, factors.dtype
