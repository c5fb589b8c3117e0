"""``Plan``: what happens to each parameter and module of a model, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrot.edits.steps import FoldedNorm, OnlineSite, Rotate, WeightEdit
from fastrot.rotations import GIVEN
from fastrot.transform_config import TransformConfig


@dataclass(frozen=True)
class Plan:
    """What :func:`fastrot.apply` does to a model; ``str(plan)`` is a table.

    Attributes:
        model_class: class of the model it was made for.
        weights: one edit for each parameter.
        norms: those that become scale-free, or already are.
        online: the rotations that act at run time.
        transform_config: the same rotations in compressed-tensors' schema.
        seed: the source of all randomness.
        shapes: shape of every parameter that is written.
        outline: digest of the names, shapes and ties of all parameters of that model.
        by_table: whether fastrot's table described its modules, and so knows their classes.
        notes: what the weights predict about precision, if they were in memory.
    """

    model_class: str
    weights: tuple[WeightEdit, ...]
    norms: tuple[FoldedNorm, ...]
    online: tuple[OnlineSite, ...]
    transform_config: TransformConfig
    seed: int
    shapes: dict[str, tuple[int, ...]]
    outline: str
    by_table: bool = True
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that are written."""
        return (*(e.parameter for e in self.weights), *(n.parameter for n in self.written_norms))

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Given matrices and permutations by their digests, which JSON data does not hold."""
        steps = (step for edit in self.weights for step in edit.steps if isinstance(step, Rotate))
        rotations = (*(step.rotation for step in steps), *(site.rotation for site in self.online))
        return {r.label: r.operand for r in rotations if r.kind in GIVEN and r.operand is not None}

    @property
    def written_norms(self) -> tuple[FoldedNorm, ...]:
        """The norms that have a weight."""
        return tuple(norm for norm in self.norms if norm.weighted)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, of which :meth:`from_dict` makes an equal plan."""
        from fastrot.edits.document import plan_to_dict

        return plan_to_dict(self)

    @staticmethod
    def from_dict(data: Any, matrices: Mapping[str, Tensor] | None = None) -> "Plan":
        """The plan that :meth:`to_dict` wrote.

        Args:
            data: what it wrote.
            matrices: :attr:`matrices` of that plan; without them it can be read, but not applied.

        Raises:
            RotationError: names the field that is wrong, unknown or missing.
        """
        from fastrot.edits.document import plan_from_dict

        return plan_from_dict(data, matrices or {})

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict per parameter or module: name, shape, operations."""
        for edit in self.weights:
            operations = [str(step) for step in edit.steps]
            if edit.source is not None:
                operations.insert(0, f"untied from {edit.source} (keep_head=True leaves them tied)")
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
        for site in self.online:
            yield {"name": site.module, "shape": "online", "operations": [str(site)]}

    def __str__(self) -> str:
        cells = [
            (row["name"], _size(row["shape"]), "; ".join(row["operations"])) for row in self.rows()
        ]
        widths = [max(len(cell[i]) for cell in [*cells, ("", "", "")]) for i in range(2)]
        groups = ", ".join(self.transform_config.config_groups)
        head = (
            f"{self.model_class}: {groups}, seed {self.seed}; {len(self.weights)} weights rotated, "
            f"{len(self.written_norms)} norms folded, {len(self.online)} online"
        )
        lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in cells]
        return "\n".join([head, *lines, *(f"  note: {note}" for note in self.notes)])


def _size(shape: tuple[int, ...] | str) -> str:
    return shape if isinstance(shape, str) else "x".join(map(str, shape))
