"""What happens to one parameter, norm or module."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastrot.mapping import NormKind
from fastrot.rotations import Rotation
from fastrot.rotations.stages import Stage


@dataclass(frozen=True)
class Part:
    """``size`` entries, before ``behind`` others, in each of ``groups`` parts of a dimension."""

    groups: int
    size: int
    behind: int = 0

    def pieces(self, length: int) -> Iterator[tuple[slice, bool]]:
        """All slices of a dimension of this length, and whether they belong to the part."""
        each = length // self.groups
        for start in range(0, length, each):
            stop = start + each - self.behind
            middle = stop - self.size
            if middle > start:
                yield slice(start, middle), False
            yield slice(middle, stop), True
            if self.behind:
                yield slice(stop, start + each), False

    def __str__(self) -> str:
        return f"{self.size} before {self.behind}" if self.behind else f"values of {self.groups}"


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

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The factors of the rotation, or of its inverse."""
        return self.rotation.stages(inverse=self.inverse)

    def __str__(self) -> str:
        part = "" if self.part is None else f"[{self.part}]"
        return f"{self.group}{'ᵀ' if self.inverse else ''} dim {self.dim}{part} ({self.rotation})"


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

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scales among its factors."""
        return tuple(step for step in self.steps if isinstance(step, Scale))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the schemes that its rotations come from, each once."""
        turns = (step for step in self.steps if isinstance(step, Rotate))
        return tuple(dict.fromkeys(step.group for step in turns))


@dataclass(frozen=True)
class FoldedNorm:
    """A norm whose scale moves into its readers: its weight becomes what leaves a scale of one.

    Attributes:
        name: of the module, or of a bare vector.
        offset: what it adds to its weight.
        kind: ``rms``, ``layer``, or ``scale`` for a bare vector.
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
        return self.name if self.kind == "scale" else f"{self.name}.weight"

    @property
    def module(self) -> str:
        """The name of the module that holds the weight."""
        return self.name.rpartition(".")[0] if self.kind == "scale" else self.name

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
