"""``Plan``: what happens to each parameter and module of a model, as data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastrot.mapping import NormKind
from fastrot.rotation import Rotation
from fastrot.transform_config import TransformConfig


@dataclass(frozen=True)
class Part:
    """The last ``size`` entries of each of ``groups`` equal parts of a dimension."""

    groups: int
    size: int

    def pieces(self, length: int) -> Iterator[tuple[slice, bool]]:
        """All slices of a dimension of this length, and whether they belong to the part."""
        each = length // self.groups
        for start in range(0, length, each):
            middle = start + each - self.size
            if middle > start:
                yield slice(start, middle), False
            yield slice(middle, start + each), True


@dataclass(frozen=True)
class Scale:
    """Multiply a parameter along one dimension by a norm's ``weight + offset``, or divide by it."""

    dim: int
    norm: str
    offset: float
    inverse: bool = False

    def __str__(self) -> str:
        factor = f"({self.norm} + {self.offset:g})" if self.offset else self.norm
        return f"{'/' if self.inverse else '·'} {factor}"


@dataclass(frozen=True)
class Rotate:
    """Multiply the vectors along one dimension of a parameter by a rotation: ``v → v Q``.

    Attributes:
        dim: where the vectors lie.
        rotation: ``Q``.
        inverse: use the transpose.
        group: name of the scheme it comes from.
        part: only these entries of the dimension; None for all.
    """

    dim: int
    rotation: Rotation
    inverse: bool
    group: str
    part: Part | None = None

    def __str__(self) -> str:
        values = "" if self.part is None else f"[values of {self.part.groups}]"
        return f"{self.group}{'ᵀ' if self.inverse else ''} dim {self.dim}{values} ({self.rotation})"


@dataclass(frozen=True)
class WeightEdit:
    """All factors of one parameter, in order: read once, computed in ``dtype``, written once.

    Attributes:
        parameter: its full name.
        steps: the factors.
        dtype: float64 or float32.
        source: the parameter with which this one is tied; it is untied first.
    """

    parameter: str
    steps: tuple[Scale | Rotate, ...]
    dtype: torch.dtype
    source: str | None = None


@dataclass(frozen=True)
class FoldedNorm:
    """A norm whose scale moves into its readers: its weight becomes what leaves a scale of one.

    Attributes:
        name: of the module.
        offset: what it adds to its weight.
        kind: ``rms`` or ``layer``.
        width: size of its input.
        weighted: whether it has a weight at all; one without is only checked to be what it should.
    """

    name: str
    offset: float
    kind: NormKind
    width: int
    weighted: bool = True

    @property
    def parameter(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight"

    @property
    def value(self) -> float:
        """What its weight is filled with."""
        return 1.0 - self.offset


@dataclass(frozen=True)
class OnlineSite:
    """A rotation that acts at run time.

    Attributes:
        module: full name of the module.
        location: ``input``, ``output``, ``q_attn``, ``k_cache``, or ``down_input``: what goes into
            the down projections of stacked experts.
        rotation: acts on the last dimension.
        inverse: use the transpose.
        group: name of the scheme it comes from.
        dtype: of the arithmetic, at least that of the activations.
    """

    module: str
    location: str
    rotation: Rotation
    inverse: bool
    group: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        # transformers' eager loop over experts leaves no place to act, so it is not run.
        note = ", experts grouped or batched" if self.location == "down_input" else ""
        return f"{self.group}{'ᵀ' if self.inverse else ''} {self.location} ({self.rotation}){note}"


@dataclass(frozen=True)
class Plan:
    """What :func:`fastrot.apply` does to a model; ``str(plan)`` is a table.

    Attributes:
        model_class: class of the model it was made for.
        edits: one per parameter.
        norms: those that become scale-free, or already are.
        sites: the online rotations.
        transform_config: the same rotations in compressed-tensors' schema.
        seed: the source of all randomness.
        shapes: shape of every parameter that is written.
        outline: digest of the names, shapes and ties of all parameters of that model.
        by_table: whether fastrot's table described its modules, and so knows their classes.
        notes: what the weights predict about precision, if they were in memory.
    """

    model_class: str
    edits: tuple[WeightEdit, ...]
    norms: tuple[FoldedNorm, ...]
    sites: tuple[OnlineSite, ...]
    transform_config: TransformConfig
    seed: int
    shapes: dict[str, tuple[int, ...]]
    outline: str
    by_table: bool = True
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that are written."""
        return (*(e.parameter for e in self.edits), *(n.parameter for n in self.written_norms))

    @property
    def written_norms(self) -> tuple[FoldedNorm, ...]:
        """The norms that have a weight."""
        return tuple(norm for norm in self.norms if norm.weighted)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict per parameter or module: name, shape, operations."""
        for edit in self.edits:
            operations = [str(step) for step in edit.steps]
            if edit.source is not None:
                operations.insert(0, f"untied from {edit.source}")
            yield {
                "name": edit.parameter,
                "shape": self.shapes[edit.parameter],
                "operations": operations,
            }
        for norm in self.written_norms:
            yield {
                "name": norm.parameter,
                "shape": self.shapes[norm.parameter],
                "operations": [f"set to {norm.value:g}"],
            }
        for site in self.sites:
            yield {"name": site.module, "shape": "online", "operations": [str(site)]}

    def __str__(self) -> str:
        cells = [
            (row["name"], _size(row["shape"]), "; ".join(row["operations"])) for row in self.rows()
        ]
        widths = [max(len(cell[i]) for cell in [*cells, ("", "", "")]) for i in range(2)]
        groups = ", ".join(self.transform_config.config_groups)
        head = (
            f"{self.model_class}: {groups}, seed {self.seed}; {len(self.edits)} weights rotated, "
            f"{len(self.written_norms)} norms folded, {len(self.sites)} online"
        )
        lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in cells]
        return "\n".join([head, *lines, *(f"  note: {note}" for note in self.notes)])


def _size(shape: tuple[int, ...] | str) -> str:
    return shape if isinstance(shape, str) else "x".join(map(str, shape))
