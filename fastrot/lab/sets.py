"""Names of sets of rotations, and what a report compares if nobody says."""

from collections.abc import Collection, Sequence

from fastrot.errors import RotationError
from fastrot.mapping import ROTATIONS

SCHEMES = ("a4kv4", "w4a4kv4", "w4", "w8a8", "mxfp4", "nvfp4")
SETS = ("none", "R1R2", "R1-R4")


def rotations_of(name: str) -> tuple[str, ...]:
    """The rotations of a set: ``none``, ``R1R2``, ``R1-R4`` (from one to another), in any case.

    Raises:
        RotationError: no such set.
    """
    wanted = name.upper()
    first, _, last = wanted.partition("-")
    if wanted == "NONE":
        return ()
    if first in ROTATIONS and last in ROTATIONS:
        found = ROTATIONS[ROTATIONS.index(first) : ROTATIONS.index(last) + 1]
    else:
        found = tuple(r for r in ROTATIONS if r in wanted)
        if "".join(found) != wanted:
            found = ()
    if not found:
        raise RotationError(
            f"set of rotations {name!r} is unknown; there are none, and {', '.join(ROTATIONS)} in "
            "this order, joined as in R1R2 or from one to another as in R1-R4"
        )
    return found


def in_order(sets: Sequence[str]) -> list[str]:
    """The names of sets in one form, each once, those with the fewest rotations first."""
    found = sorted({rotations_of(name) for name in sets}, key=lambda r: (len(r), r))
    return [_name(rotations) for rotations in found]


def without(sets: Sequence[str], refused: Collection[str]) -> list[str]:
    """The sets in order, less some rotations."""
    left = [tuple(r for r in rotations_of(name) if r not in refused) for name in sets]
    return in_order([_name(rotations) for rotations in left])


def _name(rotations: tuple[str, ...]) -> str:
    if len(rotations) > 2 and rotations_of(f"{rotations[0]}-{rotations[-1]}") == rotations:
        return f"{rotations[0]}-{rotations[-1]}"
    return "".join(rotations) or "none"
