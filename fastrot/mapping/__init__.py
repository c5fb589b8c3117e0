"""The tables: which modules read and write the residual stream, one row a shape."""

from fastrot.mapping.refused import REFUSED
from fastrot.mapping.roles import (
    PLACES,
    ROLES,
    ROTATIONS,
    STREAM,
    Architecture,
    Mapping,
    Norm,
    NormKind,
    NormMapping,
    Patterns,
    Shell,
    Untouched,
    as_mapping,
    as_norm_mapping,
    as_patterns,
    with_head,
)
from fastrot.mapping.tables import (
    ARCHITECTURES,
    SHELLS,
    UnknownArchitectureError,
    find_architecture,
)

__all__ = [
    "ARCHITECTURES",
    "PLACES",
    "REFUSED",
    "ROLES",
    "ROTATIONS",
    "SHELLS",
    "STREAM",
    "Architecture",
    "Mapping",
    "Norm",
    "NormKind",
    "NormMapping",
    "Patterns",
    "Shell",
    "UnknownArchitectureError",
    "Untouched",
    "as_mapping",
    "as_norm_mapping",
    "as_patterns",
    "find_architecture",
    "with_head",
]
