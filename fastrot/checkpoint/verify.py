"""Whether a checkpoint is what a rotation makes of another: tensor by tensor, loading neither."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastrot.checkpoint.drafts import is_draft
from fastrot.checkpoint.header import Entry, Layout, read_entry, read_headers, read_into
from fastrot.checkpoint.job import prepare
from fastrot.checkpoint.outputs import Job
from fastrot.checkpoint.panels import Panel, panels_of
from fastrot.checkpoint.rotate import PANEL
from fastrot.checkpoint.source import configuration, read_json, weight_files
from fastrot.checkpoint.tasks import Task
from fastrot.errors import RecordError, RotationError
from fastrot.kernels.weight import Workspace
from fastrot.recipe import Recipe

ARITHMETIC = 2.0**-18
"""What float32 arithmetic adds, of the root mean square; rounding comes on top."""

FINE = EQUAL, ROUNDED = "", "rounded"
"""Verdicts on a tensor; any other says what is wrong with it."""

UNREAD = {
    "_name_or_path",
    "architectures",
    "dtype",
    "fastrot",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Settings that may differ: logits do not depend on them, or they are compared by themselves."""


@dataclass(frozen=True)
class TensorVerification:
    """How two checkpoints compare; it counts as true if the second is the first one, rotated.

    Attributes:
        equal: tensors that are equal bit for bit.
        rounded: tensors that differ by rounding alone, as another device's may.
        problems: what is wrong, a line for each tensor.
    """

    equal: int
    rounded: int
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"tensors            {self.equal} equal bit for bit, {self.rounded} to rounding"]
        lines += self.problems[:10]
        if len(self.problems) > 10:
            lines.append(f"… and {len(self.problems) - 10} more")
        lines.append(
            "verified: the rotated source" if self else "FAILED: not what the rotation makes of it"
        )
        return "\n".join(lines)


def verify_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: Recipe | None = None,
    *,
    progress: bool = False,
) -> TensorVerification:
    """Rotate a checkpoint again, as the record of another one says, and compare every tensor.

    That finds whatever happened to the second one: it does not say whether its rotation is the
    right one for the model, as the logits do (:func:`fastrot.verify`).

    Args:
        source: the original.
        target: the rotated one.
        recipe: what it was rotated with, if that has matrices, of which a record knows no values.
        progress: show a bar.

    Raises:
        RotationError: the target has no record, or one of more than the rotation of this source, or
            of another recipe.
        OSError: a file can't be read.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    entries, _ = read_headers(weight_files(target))
    config = configuration(source)
    recorded = _recorded(source, target)
    assert recorded.transform_config is not None
    groups = recorded.transform_config.config_groups.values()
    if recipe is None and any(scheme.matrices for scheme in groups):
        raise RotationError(
            f"{target} was rotated with matrices, of which its record has digests only; give their "
            "recipe (recipe=, --learned FILE), or compare logits (--full)"
        )
    kept = any(is_draft(name, config) for name in entries)
    job = prepare(source, recipe or recorded, drafts="copy" if kept else "drop")
    if job.plan.transform_config != recorded.transform_config:
        raise RotationError(f"the record of {target} is not that of the recipe that was given")
    found = [*_compared(job, target, entries, progress)]
    verdicts = [verdict for _, verdict in found]
    problems = tuple(f"{name}: {verdict}" for name, verdict in found if verdict not in FINE)
    return TensorVerification(verdicts.count(EQUAL), verdicts.count(ROUNDED), problems)


def _recorded(source: Path, target: Path) -> Recipe:
    """The recipe that the record of the target adds to that of the source."""
    records: list[Any] = []
    for folder in (source, target):
        configuration(folder)
        record = read_json(folder / "config.json").get("fastrot")
        records.append(record.get("applied", []) if isinstance(record, dict) else [])
    before, after = records
    if not after:
        raise RotationError(f"{target} has no record of a rotation; --full compares logits")
    if after[: len(before)] != before or len(after) != len(before) + 1:
        raise RotationError(
            f"the record of {target} has {len(after)} rotations, that of {source} {len(before)}: "
            "tensors can be compared across one; --full compares logits"
        )
    try:
        return Recipe(transform_config=after[-1]["transform_config"], seed=after[-1]["seed"])
    except (KeyError, TypeError) as error:
        raise RecordError(f"the record of {target} is damaged: {error}") from error


def _compared(
    job: Job, target: Path, entries: dict[str, Entry], progress: bool
) -> Iterator[tuple[str, str]]:
    left = dict(entries)
    workspace = Workspace(0, 0)
    bar = tqdm(total=job.nbytes, desc="comparing", unit="B", unit_scale=True, disable=not progress)
    with bar:
        for file in job.files:
            for name, value in file.constants.items():
                there = left.pop(name, None)
                same = there is not None and torch.equal(read_entry(there), value)
                yield name, EQUAL if same else "missing" if there is None else "another operand"
            for task in file.tasks:
                there = left.pop(task.name, None)
                bar.update(task.layout.nbytes)
                if there is None or there.shape != task.layout.shape:
                    yield task.name, "missing" if there is None else f"has shape {there.shape}"
                    continue
                if there.dtype.is_floating_point != task.layout.dtype.is_floating_point:
                    yield task.name, f"is {there.dtype}"
                    continue
                as_there = replace(task, layout=Layout(there.shape, there.dtype))
                yield task.name, _judged(as_there, there, job, workspace)
    for name in left:
        yield name, "is not of this rotation"
    yield from _unlike(job.config, target)


def _unlike(expected: dict[str, Any], target: Path) -> Iterator[tuple[str, str]]:
    """What the configuration says otherwise; the same weights would be another model."""
    if read_json(target / "config.json")["fastrot"] != expected["fastrot"]:
        yield "config.json", "its record ('fastrot') is not that of this rotation"
    with TemporaryDirectory() as folder:  # read by the same code, which has values of its own
        (Path(folder) / "config.json").write_text(json.dumps(expected), encoding="utf-8")
        wanted, got = (_settings(configuration(f).to_dict()) for f in (Path(folder), target))
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            yield (
                "config.json",
                f"{name} is {got.get(name)!r:.60}, expected {wanted.get(name)!r:.60}",
            )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration decides about logits, here and in its parts."""
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in UNREAD
    }


def _judged(task: Task, there: Entry, job: Job, workspace: Workspace) -> str:
    verdict = EQUAL
    with task.source.file.open("rb") as old, there.file.open("rb") as new:
        for rows in panels_of(task, PANEL):
            panel = Panel(task, rows)
            memory = np.empty(max(1, panel.nbytes), np.uint8)
            start, length = panel.read
            read_into(old.fileno(), task.source, start, memory.data[:length])
            tensor = torch.from_numpy(memory)
            if panel.acts:
                panel.rotate(tensor, job.norms, workspace)
            expected = panel.result(tensor)
            raw = np.empty(max(1, len(expected)), np.uint8)
            start, length = panel.wrote
            read_into(new.fileno(), there, start, raw.data[:length])
            got = torch.from_numpy(raw)[:length]
            if torch.equal(got, expected):
                continue
            if not panel.acts:  # there is nothing that another device could round otherwise
                off = (got != expected).view(-1, there.dtype.itemsize).any(1)
                return f"{int(off.sum())} entries differ from the source, which is copied"
            problem = _difference(got.view(there.dtype), expected.view(there.dtype))
            if problem:
                return problem
            verdict = ROUNDED
    return verdict


def _difference(got: Tensor, expected: Tensor) -> str:
    """How far two tensors differ by more than rounding; empty if they don't."""
    if not got.is_floating_point():
        return f"{int((got != expected).sum())} entries differ"
    size = torch.finfo(got.dtype).eps
    got, expected = got.double(), expected.double()
    rms = float(expected.square().mean().sqrt())
    allowed = size * expected.abs() + max(size * 2**-4, ARITHMETIC) * rms
    off = (got - expected).abs()
    bad = ~(off <= allowed)
    if not bad.any():
        return ""
    return (
        f"{int(bad.sum())} of {bad.numel()} entries differ by more than rounding, at most "
        f"{float(off.max()) / max(rms, 1e-300):.1e} of the root mean square"
    )
