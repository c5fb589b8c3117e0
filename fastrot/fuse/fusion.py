"""The weight part of a plan: every weight is read once, rotated and rounded once."""

from contextlib import suppress

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastrot.edits import Plan, WeightEdit
from fastrot.fuse.writes import Write, as_written, scales_of, workspaces_for, writes_of
from fastrot.index import Index
from fastrot.journal import Journal
from fastrot.memory import owned


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

    def __init__(self, model: nn.Module | Index, plan: Plan):
        self._index = Index.of(model)
        self.parameters = plan.parameters
        self._untied: dict[str, nn.Parameter] = {}
        self._moved: dict[str, Tensor] = {}
        self._resets = [(self._target(n.parameter), n.value) for n in plan.written_norms]
        self._writes: list[tuple[Tensor, list[Write]]] = []
        # Untied heads come first: they read the embedding as it was.
        scales = scales_of(self._index.parameters.__getitem__)
        with as_written():
            for edit in sorted(plan.weights, key=lambda edit: edit.source is None):
                source = self._index.parameters[edit.parameter]
                if edit.source is not None:
                    fresh = nn.Parameter(_like(source), source.requires_grad)
                    self._untied[edit.parameter] = fresh
                target = self._target(edit.parameter)
                self._writes.append((target, writes_of(scales, source, target, edit)))
            self._workspaces = workspaces_for([w for _, writes in self._writes for w in writes])

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
        parameter = self._index.parameters[name]
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
            journal.replace(self._index.model, name, parameter)
        bar = tqdm(self._writes, "rotating weights", unit="weight") if progress else None
        journal.writing()
        with as_written():
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
                journal.set(self._index.parameters[name], "data", data)
        if bar is not None:
            with suppress(OSError, ValueError):
                bar.close()


def rotated(model: nn.Module | Index, edit: WeightEdit) -> Tensor:
    """What an edit makes of its parameter, in float64, without touching it."""
    parameters = Index.of(model).parameters
    source = parameters[edit.parameter]
    with as_written():
        target = torch.empty(source.shape, dtype=torch.float64, device=source.device)
        writes = writes_of(scales_of(parameters.__getitem__), source, target, edit)
        workspaces = workspaces_for(writes)
        for rotation, x, out in writes:
            rotation.run(x, out, workspaces[x.device])
    return target


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)
