"""``fastrot.suggest_mapping``: a row for a model that the tables do not list, measured and tried.

Nothing in fastrot uses a suggestion by itself: read it, then pass it as ``mappings`` and
``norm_mappings``, or paste it into the tables.
"""

import copy
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastrot.api import apply, plan
from fastrot.checks import AlreadyRotatedError, check_model
from fastrot.errors import RotationError
from fastrot.hadamard import HadamardSizeError
from fastrot.mapping import ROTATIONS, Architecture, Mapping, NormMapping, Untouched
from fastrot.record import applied_groups
from fastrot.suggest.probe import measure
from fastrot.suggest.propose import propose
from fastrot.suggest.tiny import cached_logits, logits, random_ids, tiny_copy

LIMIT = 1e-6


@dataclass(frozen=True)
class Suggestion:
    """A proposed row, and how far it was found to hold.

    ``print`` shows it as Python, to be pasted into the tables.

    Attributes:
        model_type: transformers' name of the model.
        row: the row; ``refuses`` holds the rotations that did not work.
        errors: rotation → relative float64 error of the logits of a tiny copy, or why not.
        uncertain: what stayed unclear, and should be looked at.
    """

    model_type: str
    row: Architecture
    errors: MappingABC[str, float | str]
    uncertain: tuple[str, ...] = ()

    @property
    def mapping(self) -> Mapping:
        """For ``mappings=``."""
        return self.row.mapping

    @property
    def norms(self) -> tuple[NormMapping, ...]:
        """For ``norm_mappings=``."""
        return self.row.norms

    def __str__(self) -> str:
        measured = [
            f"{name}: {error}" if isinstance(error, str) else f"{name}: off by {error:.1e}"
            for name, error in self.errors.items()
        ]
        failed = "R1" in self.row.refuses
        head = ["R1 DOES NOT HOLD: this row is incomplete.", *self.uncertain] if failed else []
        foot = ["Measured on a tiny random copy in float64:", *measured]
        if self.uncertain and not failed:
            foot += ["Uncertain:", *self.uncertain]
        above, below = (
            "".join(f"# {line}\n" for line in "\n".join(lines).splitlines())
            for lines in ([f"model type {self.model_type!r}", *head], foot)
        )
        return f"{above}{_code(self.row)}\n{below}"


def suggest_mapping(model: PreTrainedModel) -> Suggestion:
    """A mapping for a model whose architecture is not in the tables.

    A tiny random copy of its class is made; its gradients tell what reads and writes the residual
    stream. The mapping is then tried on the copy, each rotation by itself. It holds for models with
    these settings: flags of the configuration that change the flow of the data need rows of their
    own (``Architecture.when``).

    Args:
        model: a decoder with a language-modelling head; it is not touched and may lie on the meta
            device.

    Raises:
        TypeError: no transformers model.
        RotationError: no causal language model, or one of which no tiny copy can be made.
    """
    check_model(model)
    if done := applied_groups(model.config):
        raise AlreadyRotatedError(f"{' and '.join(done)} is already on this model")
    if model.config.get_text_config() is not model.config:
        raise RotationError(
            f"{type(model).__name__} is a model around a language model; suggest_mapping probes "
            "language models only, and knows nothing of what else writes into their stream"
        )
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not all(isinstance(getattr(end, "weight", None), nn.Parameter) for end in ends):
        raise RotationError(
            f"{type(model).__name__} has no language-modelling head (or embedding) with a weight, "
            "from which the residual stream is traced; pass the causal language model"
        )
    small = tiny_copy(model)
    findings, charges = measure(small)
    row = propose(small, findings, charges)
    errors = {name: _try(small, row, name) for name in ROTATIONS}
    refuses = {
        name: error if isinstance(error, str) else f"changes the logits by {error:.1e}"
        for name, error in errors.items()
        if isinstance(error, str) or not error <= LIMIT
    }
    row = replace(row, refuses=refuses)
    uncertain = [f"{name} {reason}" for name, reason in findings.unclear.items()]
    if not findings.found:
        uncertain.insert(0, "no set of readers and writers can be rotated from embedding to head")
    if row.mapping.attn_gated and "R2" not in refuses:
        uncertain.append("no values turn with attn_o (a gate between?): R2 acts online")
    uncertain += [
        f"{name}={value}: the copy may have stayed within it"
        for name, value in vars(model.config).items()
        if "clip" in name and value
    ]
    uncertain += _on_the_model(model, row)
    return Suggestion(model.config.model_type, row, errors, tuple(uncertain))


@torch.no_grad()
def _try(small: PreTrainedModel, row: Architecture, rotation: str) -> float | str:
    """The relative error after one rotation, or what fastrot has against it."""
    ids = random_ids(small, 5)
    try:
        function = cached_logits
        before = function(small, ids)
    except Exception:  # no cache, or none for float64
        function = logits
        before = function(small, ids)
    # Sizes of the copy may be none of a Hadamard matrix, where the model's are.
    for kind in ("random-hadamard", "random-matrix"):
        rotated = copy.deepcopy(small)
        try:
            apply(
                rotated,
                rotation,
                transform_type=kind,
                precision=torch.float64,
                mappings=row.mapping,
                norm_mappings=row.norms,
                trust=True,
            )
            return float((function(rotated, ids) - before).norm() / before.norm())
        except HadamardSizeError:
            continue
        except Exception as error:  # whatever stands in the way is the reason to refuse
            return str(error)
    raise AssertionError("a random matrix has any size")


def _on_the_model(model: PreTrainedModel, row: Architecture) -> list[str]:
    """What stands in the way on the model itself."""
    wanted = [name for name in ROTATIONS if name not in row.refuses]
    try:
        if wanted:
            plan(
                model,
                wanted,
                transform_type="random-matrix",  # sizes are another matter
                mappings=row.mapping,
                norm_mappings=row.norms,
                trust=True,
            )
    except (ValueError, TypeError) as error:
        return [f"on the model itself: {error}"]
    return []


def _code(value: Any, indent: int = 0) -> str:
    """A row as Python, fields with their default left out."""
    if isinstance(value, str):
        raw = "r" if "\\" in value else ""
        return repr(value) if '"' in value or "\n" in value else f'{raw}"{value}"'
    if isinstance(value, Untouched):
        head, items = "Untouched(", [_code(item, indent + 4) for item in value]
    elif is_dataclass(value):
        head = f"{type(value).__name__}("
        items = [
            f"{field.name}={_code(found, indent + 4)}"
            for field in fields(value)
            if (found := getattr(value, field.name)) not in (field.default, {}, ())
        ]
    elif isinstance(value, tuple):
        head, items = "(", [_code(item, indent + 4) for item in value]
    elif isinstance(value, dict):
        head = "{"
        items = [f"{_code(key)}: {_code(item, indent + 4)}" for key, item in value.items()]
    else:
        return repr(value)
    tail = "}" if head == "{" else ")"
    flat = head + ", ".join(items) + ("," if head == "(" and len(items) == 1 else "") + tail
    if len(flat) + indent < 96 and "\n" not in flat:
        return flat
    lines = "".join(f"{' ' * (indent + 4)}{item},\n" for item in items)
    return f"{head}\n{lines}{' ' * indent}{tail}"
