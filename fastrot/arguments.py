"""The arguments of ``plan`` and ``apply``, checked and in one form."""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as MappingABC
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from fastrot.errors import RotationError
from fastrot.mapping import ROTATIONS, NormMapping, as_norm_mapping
from fastrot.rotations import MATRIX, PERMUTATION, Rotation

GIVEN_BY: dict[str, tuple[str, Callable[[Any], Rotation], str]] = {
    "matrices": (MATRIX, Rotation.from_matrix, "{'R1': q}"),
    "permutations": (PERMUTATION, Rotation.from_permutation, "{'R4': order}"),
}


def parse_rotations(rotations: str | Sequence[str]) -> tuple[str, ...]:
    """The names of R1 to R4, in this order."""
    names = (rotations,) if isinstance(rotations, str) else rotations
    if not isinstance(names, Iterable):
        raise TypeError(f"rotations must be a list of names such as 'R1', got {rotations!r}")
    wanted: list[str] = []
    for name in names:
        upper = name.upper() if isinstance(name, str) else name
        if upper not in ROTATIONS:
            near = get_close_matches(str(name).upper(), ROTATIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RotationError(f"rotation {name!r} is not one of {', '.join(ROTATIONS)}{hint}")
        if upper in wanted:
            raise RotationError(f"rotation {upper} is named twice in {names}")
        wanted.append(upper)
    if not wanted:
        raise RotationError(f"rotations is empty; name some of {', '.join(ROTATIONS)}")
    return tuple(name for name in ROTATIONS if name in wanted)


def parse_seed(seed: int) -> int:
    """A seed as Python's int, of whatever type of whole numbers it is.

    Raises:
        TypeError: no whole number.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    return int(seed)


def parse_norms(value: Sequence[Any] | None) -> tuple[NormMapping, ...] | None:
    """The norms that a caller describes; None to take those of the table."""
    if value is None:
        return None
    if isinstance(value, (str, MappingABC)) or not isinstance(value, Iterable):
        raise TypeError(f"norm_mappings must be a list of NormMapping, got {value!r}")
    return tuple(map(as_norm_mapping, value))


def parse_given(what: str, value: Any, rotations: Sequence[str]) -> dict[str, tuple[Rotation, ...]]:
    """``matrices`` or ``permutations``, checked: for each name one, or one for each layer."""
    kind, make, example = GIVEN_BY[what]
    if not isinstance(value, MappingABC):
        raise TypeError(f"{what} must be a dict such as {example}, got {value!r:.60}")
    found: dict[str, tuple[Rotation, ...]] = {}
    for name, given in value.items():
        upper = name.upper() if isinstance(name, str) else name
        if upper not in rotations or upper in found:
            wrong = "named twice" if upper in found else f"not one of {', '.join(rotations)}"
            raise RotationError(f"{what}: {name!r} is {wrong}")
        several = isinstance(given, (list, tuple)) and not isinstance(
            next(iter(given), None), Integral
        )
        items = tuple(given) if several else (given,)
        if not items:
            raise RotationError(f"{what}: the list of {upper} is empty")
        made = []
        for number, item in enumerate(items):
            where = f"{what}: {upper}" + (f" of layer {number}" if several else "")
            try:
                made.append(item if isinstance(item, Rotation) else make(item))
            except (RotationError, TypeError) as error:
                raise type(error)(f"{where}: {error}") from None
            if made[-1].kind != kind or made[-1].size != made[0].size:
                raise RotationError(
                    f"{where}: {made[-1]} is not a given {kind} of order {made[0].size}"
                )
        found[upper] = tuple(made)
    return found
