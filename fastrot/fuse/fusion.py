"""The weight part of a plan: every weight is read once, rotated and rounded once."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastrot.edits import Plan, Rotate, Scale, WeightEdit
from fastrot.fuse.torch_weight import TorchRotation
from fastrot.journal import Journal
from fastrot.kernels import gpu_weight
from fastrot.kernels.gpu_weight import TritonRotation
from fastrot.kernels.weight import Side, Stage, Workspace
from fastrot.memory import owned

if TYPE_CHECKING:  # it imports numba, and whoever only plans has no use for that
    from fastrot.kernels.cpu_weight import MatrixRotation


_Step = Rotate | Tensor
"""A rotation, or a diagonal as long as the dimension."""


class _Write(NamedTuple):
    """A matrix, or a part of one, and what will be done to it."""

    rotation: "MatrixRotation | TritonRotation | TorchRotation"
    source: Tensor
    target: Tensor


class Fusion:
    """Everything that a plan does to weights, prepared: whatever can fail, fails here.

    Nothing is written yet, but all memory is there and all kernels are compiled.

    Args:
        model: the model the plan was made for.
        plan: what to do.

    Attributes:
        parameters: the names of all that is written.

    Raises:
        MemoryError, torch.OutOfMemoryError: no room for untied weights, or for the largest weight
            in the dtype of the arithmetic.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self._model = model
        self.parameters = plan.parameters
        self._untied: dict[str, nn.Parameter] = {}
        self._moved: dict[str, Tensor] = {}
        self._resets = [(self._target(n.parameter), n.value) for n in plan.written_norms]
        self._writes: list[tuple[Tensor, list[_Write]]] = []
        # Untied heads come first: they read the embedding as it was.
        with _as_written():
            for edit in sorted(plan.weights, key=lambda edit: edit.source is None):
                source = model.get_parameter(edit.parameter)
                if edit.source is not None:
                    fresh = nn.Parameter(_like(source), source.requires_grad)
                    self._untied[edit.parameter] = fresh
                target = self._target(edit.parameter)
                self._writes.append((target, _writes(model, source, target, edit)))
            self._workspaces = _workspaces([w for _, writes in self._writes for w in writes])

    @property
    def overwritten(self) -> list[Tensor]:
        """The parameters that are written where they lie: all but untied and moved ones."""
        targets = [target for target, _ in (*self._writes, *self._resets)]
        moved = {id(tensor) for tensor in (*self._moved.values(), *self._untied.values())}
        return [target for target in targets if id(target) not in moved]

    def _target(self, name: str) -> Tensor:
        """What is written: the parameter, or new memory if it is untied, or its own not torch's."""
        if name in self._untied:
            return self._untied[name]
        parameter = self._model.get_parameter(name)
        if owned(parameter):
            return parameter
        return self._moved.setdefault(name, _like(parameter))

    def run(self, journal: Journal, progress: bool = False) -> None:
        """Write.

        Args:
            journal: is told of everything that it has to take back after an error.
            progress: show a bar.
        """
        for name, parameter in self._untied.items():
            journal.replace(self._model, name, parameter)
        bar = tqdm(self._writes, "rotating weights", unit="weight") if progress else None
        journal.writing()
        with _as_written():
            for target, writes in self._writes:
                for rotation, x, out in writes:
                    rotation.run(x, out, self._workspaces[x.device])
                torch.autograd.graph.increment_version(target)
                # A terminal that has gone is no reason to stop here.
                if bar is not None:
                    with suppress(OSError, ValueError):
                        bar.update()
            for norm, value in self._resets:
                norm.fill_(value)
            for name, data in self._moved.items():
                journal.set(self._model.get_parameter(name), "data", data)
        if bar is not None:
            with suppress(OSError, ValueError):
                bar.close()


def rotated(model: nn.Module, edit: WeightEdit) -> Tensor:
    """What an edit makes of its parameter, in float64, without touching it."""
    source = model.get_parameter(edit.parameter)
    with _as_written():
        target = torch.empty(source.shape, dtype=torch.float64, device=source.device)
        writes = _writes(model, source, target, edit)
        workspaces = _workspaces(writes)
        for rotation, x, out in writes:
            rotation.run(x, out, workspaces[x.device])
    return target


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)


@contextmanager
def _as_written() -> Iterator[None]:
    """No gradient is recorded and nothing is cast, whatever surrounds the caller."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.device("cpu"),
    ):
        yield


def _workspaces(writes: list[_Write]) -> dict[torch.device, Workspace]:
    """One for each device, for the largest of its writes, with all kernels compiled."""
    needs: dict[torch.device, tuple[int, int]] = {}
    for rotation, x, _ in writes:
        scratch, panel = needs.get(x.device, (0, 0))
        needs[x.device] = max(scratch, rotation.scratch), max(panel, rotation.panel)
    made = {device: Workspace(*sizes, device) for device, sizes in needs.items()}
    ready: set[object] = set()
    for rotation, x, out in writes:
        if rotation.kind not in ready:
            rotation.rehearse(x, out, made[x.device])
            ready.add(rotation.kind)
    return made


def _writes(model: nn.Module, source: Tensor, target: Tensor, edit: WeightEdit) -> list[_Write]:
    """All factors of ``edit``, prepared.

    Args:
        model: has the norms' weights.
        source: ``(n,)``, ``(rows, cols)`` or ``(experts, rows, cols)``, floating point.
        target: as ``source``, which it may be.
        edit: the factors, and the dtype of the arithmetic.
    """
    dims = max(source.dim(), 2)
    # A vector is a matrix of one row, and its only dimension the last.
    x, out = (t.detach().view((1,) * (dims - t.dim()) + t.shape) for t in (source, target))
    steps: dict[int, list[_Step]] = {dims - 2: [], dims - 1: []}
    for step in edit.steps:
        of_dim = steps[step.dim + dims - source.dim()]
        if isinstance(step, Rotate):
            of_dim.append(step)
        else:
            of_dim.append(scale_of(model, step, edit.dtype).to(x.device))
    sides = [_pieces(x.shape[dim], steps[dim]) for dim in (dims - 2, dims - 1)]
    pairs = list(zip(*(t.view(-1, *t.shape[-2:]) for t in (x, out)), strict=True))
    writes: list[_Write] = []
    for rows, left in sides[0]:
        for cols, right in sides[1]:
            parts = [(matrix[rows, cols], result[rows, cols]) for matrix, result in pairs]
            # Experts lie in memory alike: what is prepared for one serves all.
            for like, like_out in parts[:1]:
                rotation = _rotation(like, like_out, left, right, edit.dtype)
                writes += [_Write(rotation, *part) for part in parts]
    return writes


def scale_of(model: nn.Module, step: Scale, dtype: torch.dtype = torch.float64) -> Tensor:
    """The factors of a step, one for each entry of the dimension, on the norm's device."""
    gamma = model.get_parameter(step.norm).detach().to(dtype) + step.offset
    # A bias on a channel of weight zero was refused, unless it is zero as well.
    return torch.where(gamma == 0, 0.0, 1 / gamma) if step.inverse else gamma


def _pieces(length: int, steps: list[_Step]) -> list[tuple[slice, list[_Step]]]:
    """The parts of a dimension in which the same steps act, each with its steps."""
    parts = [step.part for step in steps if isinstance(step, Rotate) and step.part is not None]
    if not parts:
        return [(slice(0, length), steps)]

    def those(piece: slice, within: bool) -> list[_Step]:
        return [
            step if isinstance(step, Rotate) else step[piece]
            for step in steps
            if within or not isinstance(step, Rotate) or step.part is None
        ]

    return [(piece, those(piece, within)) for piece, within in parts[0].pieces(length)]


def _rotation(
    x: Tensor, out: Tensor, left: list[_Step], right: list[_Step], dtype: torch.dtype
) -> "MatrixRotation | TritonRotation | TorchRotation":
    """What does it by a kernel where there is one for this memory, else by torch."""
    dense = any(isinstance(step, Rotate) and step.rotation.dense for step in (*left, *right))
    if x.stride(-1) == 1 and out.stride(-1) == 1 and not dense:
        sides = zip_longest(_sides(left), _sides(right), fillvalue=(None, None))
        stages = [Stage(on_left, on_right, g, h) for (on_left, h), (on_right, g) in sides]
        stages = stages or [Stage()]
        if x.device.type == "cpu":
            from fastrot.kernels.cpu_weight import MatrixRotation

            return MatrixRotation(x, out, stages, dtype)
        if gpu_weight.takes(x, *(side for stage in stages for side in stage[:2])):
            return TritonRotation(x, out, stages, dtype)
    return TorchRotation(x, left, right, dtype)


def _sides(steps: list[_Step]) -> list[tuple[Side | None, Tensor | None]]:
    """The transforms that make up the steps in their order, and the diagonal before each."""
    sides: list[tuple[Side | None, Tensor | None]] = []
    diagonal: Tensor | None = None
    for step in steps:
        if not isinstance(step, Rotate):
            diagonal = step if diagonal is None else diagonal * step
            continue
        rotation = step.rotation
        if rotation.fixes_ones:
            assert rotation.operand is not None
            middle = rotation.operand.repeat(rotation.size // rotation.block)
            sides.append((Side(rotation.block, rotation.column_signs, False), diagonal))
            sides.append((Side(rotation.block, rotation.column_signs, True), middle))
        else:
            sides.append((Side(rotation.block, rotation.operand, step.inverse), diagonal))
        diagonal = None
    return sides if diagonal is None else [*sides, (None, diagonal)]
