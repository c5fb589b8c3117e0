"""Which part of which tensor of a checkpoint becomes which part of which parameter.

transformers renames, merges and splits what it loads. Its own renamings and conversions are run
here on tensors without data, :class:`~fastrot.checkpoint.traced.Traced`, so that nothing of what it
does to a model has to be known twice. What is used of it: ``get_model_conversion_mapping``,
``rename_source_key``, ``dot_natural_key`` and ``WeightTransform``.
"""

import copy
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrot.checkpoint.header import CheckpointError, Entry
from fastrot.checkpoint.traced import Piece, Traced
from fastrot.errors import RotationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Target:
    """A parameter or buffer, and the pieces of the checkpoint that it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass
class Trace:
    """How a checkpoint becomes a model.

    Attributes:
        targets: parameter or buffer → what it is made of.
        unknown: tensors that the model does not have.
        ignored: those of them that transformers knows it may pass over.
        missing: what the model has and the checkpoint has not, but what is made up by design.
        renamings: those that were used, for the names of new tensors.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    renamings: list[Any] = field(default_factory=list)


def trace(
    model: "PreTrainedModel", entries: Mapping[str, Entry], more: Iterable[Any] = ()
) -> Trace:
    """Follow every tensor of a checkpoint into a model on the meta device.

    Args:
        model: its names and shapes.
        entries: the tensors of the checkpoint.
        more: renamings of transformers' kind besides those of the model.

    Raises:
        CheckpointError: a tensor has another shape than the configuration describes.
        RotationError: transformers computes something from the tensors while it loads them.
    """
    made, state = Trace(), model.state_dict()

    def traced(entry: Entry) -> Tensor:
        return Traced.of(entry.name, entry.shape, entry.dtype)

    work, made.unknown, renamings = _steps(model, entries, more, traced)
    for first, step in work.items():
        for name, value in _converted(model, first, step, state).items():
            made.targets[name] = Target(tuple(value.shape), value.pieces)  # type: ignore[attr-defined]
    made.renamings = [step for step in renamings if step.was_used()]
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
    made.ignored = [name for name in made.unknown if _any(patterns, name)]
    made.missing = missing(model, made.targets)
    return made


def loaded(
    model: "PreTrainedModel",
    entries: Mapping[str, Entry],
    read: Callable[[Entry], Tensor],
    more: Iterable[Any] = (),
) -> Iterator[tuple[str, Tensor]]:
    """What becomes of the tensors of a checkpoint in a model, one parameter or buffer at a time.

    Args:
        model: its names and shapes; what it does not have is not read.
        entries: the tensors of the checkpoint.
        read: makes the numbers of one, when they are asked for.
        more: as for :func:`trace`.

    Raises:
        CheckpointError: a tensor has another shape than the configuration describes.
    """
    work, _, _ = _steps(model, entries, more, lambda entry: partial(read, entry))
    state = model.state_dict()
    for first in [*work]:
        yield from _converted(model, first, work.pop(first), state).items()


def missing(model: "PreTrainedModel", found: Container[str]) -> list[str]:
    """What a model has and a checkpoint has not, but what is made up by design."""
    made_up = model._keys_to_ignore_on_load_missing or set()
    return [name for name in model.state_dict() if name not in found and not _any(made_up, name)]


def _steps(
    model: "PreTrainedModel",
    entries: Mapping[str, Entry],
    more: Iterable[Any],
    tensor: Callable[[Entry], Any],
) -> tuple[dict[str, Any], list[str], list[Any]]:
    """What makes the tensors of a model, by the first it makes; names it lacks; all renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = [*get_model_conversion_mapping(model), *more]
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    converter_of = {pattern: step for step in converters for pattern in step.source_patterns}
    state, base = model.state_dict(), model.base_model_prefix
    work, unknown = dict[str, Any](), list[str]()
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, base, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], base, state)
        if target not in state:
            unknown.append(name)
            continue
        step: Any
        if pattern is None:
            step, pattern = WeightRenaming(name, target), name
        else:
            step = copy.deepcopy(converter_of[pattern])
        work.setdefault(target, step).add_tensor(target, name, pattern, tensor(entries[name]))
    return work, unknown, renamings


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _converted(
    model: "PreTrainedModel", first: str, step: Any, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    try:
        values = step.convert(first, model=model, config=model.config)
    except RotationError as error:
        raise RotationError(
            f"transformers makes {first} by {error}, which can't be done to a file; load the model "
            "and use fastrot.apply"
        ) from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"the tensors for {first} do not fit together as the configuration says: {error}"
        ) from error
    made = {}
    for name, value in values.items():
        tensor = value[0] if isinstance(value, list) else value
        if name not in state:
            raise CheckpointError(f"the checkpoint makes {name}, which the model does not have")
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"the checkpoint has {name} as {tuple(tensor.shape)}, but config.json describes "
                f"{tuple(state[name].shape)}"
            )
        made[name] = tensor
    return made


def stored_names(model: "PreTrainedModel", made: Trace, names: Iterable[str]) -> dict[str, str]:
    """What parameters that the checkpoint does not have are called in it."""
    from transformers.core_model_loading import revert_weight_conversion

    model._weight_conversions = made.renamings  # type: ignore[assignment]
    stored = {}
    for name in names:
        state = {name: torch.empty(0, device="meta")}
        stored[name] = (
            next(iter(revert_weight_conversion(model, state))) if made.renamings else name
        )
    return stored
