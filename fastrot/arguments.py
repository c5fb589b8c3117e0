"""The arguments of ``plan`` and ``apply``, checked and in one form."""

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingABC
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from fastrot.errors import RotationError
from fastrot.heads import head_dim_of, key_dim_of
from fastrot.mapping import Mapping, NormMapping, as_norm_mapping
from fastrot.transform_config import ROTATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """The seed itself, if it is one."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    return seed


def parse_norms(value: Sequence[Any] | None) -> tuple[NormMapping, ...] | None:
    """The norms that a caller describes; None to take those of the table."""
    if value is None:
        return None
    if isinstance(value, (str, MappingABC)) or not isinstance(value, Iterable):
        raise TypeError(f"norm_mappings must be a list of NormMapping, got {value!r}")
    return tuple(map(as_norm_mapping, value))


def block_sizes(
    model: "PreTrainedModel",
    mapping: Mapping,
    wanted: Sequence[str],
    block_size: int | MappingABC[str, int] | None,
) -> dict[str, int | None]:
    """The block of every rotation; None spans the whole dimension."""
    sizes: dict[str, int | None] = dict.fromkeys(ROTATIONS)
    if "R2" in wanted:
        sizes["R2"] = head_dim_of(model, mapping)
    if "R3" in wanted:
        sizes["R3"] = key_dim_of(model, mapping)
    if isinstance(block_size, MappingABC):
        given = {str(name).upper(): size for name, size in block_size.items()}
        if len(given) < len(block_size):
            raise RotationError(f"block_size names a rotation twice: {', '.join(block_size)}")
    else:
        given = {name: block_size for name in ("R1", "R4") if block_size is not None}
        if given and not set(given).intersection(wanted):
            raise RotationError(
                f"block_size={block_size} is that of R1 and R4, which are not among "
                f"{', '.join(wanted)}; give R2 or R3 their own with a dict"
            )
        given = {name: size for name, size in given.items() if name in wanted}
    for name, size in given.items():
        if name not in wanted:
            known = ROTATIONS if name not in ROTATIONS else wanted
            raise RotationError(f"block_size names {name!r}, not one of {', '.join(known)}")
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"block_size of {name} must be an int, got {size!r}")
        if size < 1:
            raise RotationError(f"block_size of {name} must be positive, got {size}")
        head_dim = sizes[name]
        if head_dim is not None and head_dim % size:
            raise RotationError(f"block_size={size} of {name} does not divide head_dim {head_dim}")
        sizes[name] = size
    return sizes
