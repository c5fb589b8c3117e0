"""``Learned``: a recipe with the matrices that were learned, and how."""

import json
import math
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastrot.errors import RotationError
from fastrot.lab.evaluate import Difference
from fastrot.learning.kept import beside, read
from fastrot.recipe import Recipe

FORMAT = "1"


@dataclass(frozen=True)
class Learned(Recipe):
    """A recipe that :func:`fastrot.plan` and :func:`fastrot.apply` take, of :func:`fastrot.learn`.

    Its matrices are the learned ones, and its permutations; there are none unless the quantized
    model lost less with them than with the recipe from which they were learned, on held-out text
    and by more than two standard errors: beyond chance, a learned recipe is not worse on such text.

    Attributes:
        scheme: for which it was learned.
        steps: of descent.
        text: SHA-256 of the token ids that it was learned from.
        before: mean loss of the quantized model with the recipe, on the held-out text, in nats.
        gain: loss with what was learned minus that, with its standard error; if nothing is taken,
            with the matrices (else the permutations) that were left.
        unrotated: loss with this recipe minus that of the quantized model without any rotation, on
            the same text.
        defect: the largest entry of ``|QᵀQ - I|`` of all matrices that were learned.
        history: the loss that was descended on, of R1, for every step.
        taken: what was learned and is in the recipe, ``matrices`` and ``permutations``.
    """

    scheme: str = field(default="", compare=False)
    steps: int = field(default=0, compare=False)
    text: str = field(default="", compare=False)
    before: float = field(default=math.nan, compare=False)
    gain: Difference = field(default=Difference(0.0, 0.0), compare=False)
    unrotated: Difference = field(default=Difference(math.nan, math.nan), compare=False)
    defect: float = field(default=0.0, compare=False)
    history: tuple[float, ...] = field(default=(), compare=False)
    taken: tuple[str, ...] = field(default=(), compare=False)

    @property
    def accepted(self) -> bool:
        """Whether something learned was better, and is in the recipe."""
        return bool(self.taken)

    @property
    def is_harmful(self) -> bool:
        """Whether the quantized model clearly loses less without any rotation."""
        return self.unrotated.is_clear and self.unrotated.mean > 0

    def __str__(self) -> str:
        verdict = "left: the recipe alone is as good"
        if self.taken:
            verdict = f"{' and '.join(self.taken)} taken"
        text = (
            f"{self.scheme}: loss {self.before:.4f} with the recipe, {self.gain.mean:+.4f} ± "
            f"{self.gain.error:.4f} with what was learned; {verdict}"
        )
        if self.is_harmful:
            text += (
                f"; no rotation at all loses another {self.unrotated.mean:.4f} ± "
                f"{self.unrotated.error:.4f} less: leave the model unrotated"
            )
        return text

    def save(self, path: str | Path) -> None:
        """Write it to a file in the format of safetensors, matrices in float64.

        A file that is there already is replaced when the new one is whole.

        Raises:
            RotationError: the recipe has mappings, which the file has no place for.
            OSError: the file can't be written.
        """
        from safetensors.torch import save

        if self.mappings is not None or self.norm_mappings is not None:
            raise RotationError("a learned recipe with mappings of your own can't be saved")
        tensors = {
            f"{prefix}{name}{f'.{number}' if len(given) > 1 else ''}": item.operand.clone()
            for field, prefix in GIVEN.items()
            for name, given in (getattr(self, field) or {}).items()
            for number, item in enumerate(given)
        }
        described = {name: getattr(self, name) for name in (*_PLAIN, *_MEASURED)}
        described |= {
            "precision": None if self.precision is None else str(self.precision),
            **{name: list(astuple(getattr(self, name))) for name in _GAINS},
        }
        metadata = {"format": FORMAT, "fastrot": json.dumps(described)}
        # safetensors writes no file without tensors; a file of its own would be private (0600).
        whole = save(tensors or {"none": torch.zeros(0)}, metadata)
        with beside(Path(path)) as fresh:
            fresh.write_bytes(whole)
            fresh.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Learned":
        """The recipe that :meth:`save` wrote.

        Raises:
            RotationError: another kind of file, a value of the wrong type, a layer without a
                matrix, or a matrix that is not orthogonal to 1e-12.
            OSError: the file can't be read.
        """
        from safetensors import SafetensorError

        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder; give a file that fastrot learn wrote")
        try:
            metadata, tensors = read(Path(path))
        except SafetensorError as error:
            raise RotationError(f"{path} is no learned recipe: {error}") from None
        if metadata.get("format") != FORMAT or "fastrot" not in metadata:
            raise RotationError(f"{path} is no learned recipe of this version of fastrot")
        try:
            described: dict[str, Any] = {"unrotated": [math.nan] * 2}  # older files have none
            described |= json.loads(metadata["fastrot"])
            if missing := {*_PLAIN, *_MEASURED, *_GAINS, "precision"} - described.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            for name, kind in {**_MEASURED, **dict.fromkeys(_GAINS, _NUMBER)}.items():
                _check(name, described[name], kind, name in _LISTS)
            described |= {name: Difference(*described[name]) for name in _GAINS}
            for name in ("rotations", "history", "taken"):
                described[name] = tuple(described[name])
            if unknown := {*described["taken"]} - {*GIVEN}:
                raise ValueError(f"taken={unknown} is none of {', '.join(GIVEN)}")
            precision = described["precision"]
            if precision is not None:
                described["precision"] = precision.removeprefix("torch.")
            described |= {field: _given(tensors, prefix) for field, prefix in GIVEN.items()}
            return cls(**described)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RotationError(f"{path}: {error}") from None


GIVEN = {"matrices": "", "permutations": "before."}
"""What is learned, and how the names of its tensors begin in a file."""
_PLAIN = ("rotations", "transform_type", "randomize", "block_size", "seed", "keep_head")
_NUMBER = (int, float)
_MEASURED = {
    "scheme": str,
    "steps": int,
    "text": str,
    "before": _NUMBER,
    "defect": _NUMBER,
    "history": _NUMBER,
    "taken": str,
}
"""What else is in a file, and its types."""
_GAINS = ("gain", "unrotated")
_LISTS = (*_GAINS, "history", "taken")


def _check(name: str, value: Any, kind: Any, many: bool) -> None:
    each = value if many and isinstance(value, list) else [value]
    right = all(isinstance(one, kind) and not isinstance(one, bool) for one in each)
    if not right or isinstance(value, list) != many:
        wanted = "text" if kind is str else "whole number" if kind is int else "number"
        raise TypeError(f"{name}={value!r} is no {'list of ' if many else ''}{wanted}")


def _given(tensors: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """The tensors of a prefix by the name of the rotation: one, or one for each layer.

    Raises:
        ValueError: a layer is left out, or the name is given alone and with layers.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name != "none" and bool(prefix) == name.startswith(GIVEN["permutations"]):
            group, _, number = name.removeprefix(prefix).partition(".")
            found.setdefault(group, {})[number] = tensor
    given: dict[str, Any] = {}
    for group, each in found.items():
        numbers = [""] if "" in each else [str(number) for number in range(len(each))]
        if each.keys() != {*numbers}:
            raise ValueError(f"{group} is given of {', '.join(map(repr, each))}, not of each layer")
        ordered = [each[number] for number in numbers]
        given[group] = ordered if numbers[0] else ordered[0]
    return given or None
