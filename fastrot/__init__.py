"""Rotate language models so that they survive 4-bit quantization, exactly.

Importing fastrot registers its operators with torch and its names with transformers, so that
``from_pretrained`` knows rotated checkpoints. Everything else is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastrot.integrations.registration import register
from fastrot.kernels import hadamard_transform
from fastrot.version import __version__

if TYPE_CHECKING:
    from fastrot.api import apply, plan
    from fastrot.checkpoint.export import export
    from fastrot.checkpoint.header import CheckpointError
    from fastrot.checkpoint.rotate import RotatedCheckpoint, rotate_checkpoint
    from fastrot.checks import AlreadyRotatedError
    from fastrot.coverage import UncoveredParameterError
    from fastrot.edits import Plan
    from fastrot.errors import BusyModelError, HalfRotatedError, RecordError, RotationError
    from fastrot.fit import check
    from fastrot.foreign import ForeignCodeError
    from fastrot.hadamard import HadamardSizeError, hadamard_matrix
    from fastrot.handle import Handle
    from fastrot.learning.learned import Learned
    from fastrot.learning.learner import learn
    from fastrot.learning.spinquant_file import read_spinquant
    from fastrot.mapping import (
        Architecture,
        Mapping,
        NormMapping,
        UnknownArchitectureError,
        Untouched,
    )
    from fastrot.patterns import NoMatchError
    from fastrot.recipe import Recipe
    from fastrot.removal import remove
    from fastrot.restoration import restore
    from fastrot.rotations import Rotation
    from fastrot.rows import UnsupportedRotationError
    from fastrot.suggest import Suggestion, suggest_mapping
    from fastrot.transform_config import TransformArgs, TransformConfig, TransformScheme
    from fastrot.values import PrecisionWarning, ValueRangeError
    from fastrot.verification import Verification, verify

__all__ = [
    "AlreadyRotatedError",
    "Architecture",
    "BusyModelError",
    "CheckpointError",
    "ForeignCodeError",
    "HadamardSizeError",
    "HalfRotatedError",
    "Handle",
    "Learned",
    "Mapping",
    "NoMatchError",
    "NormMapping",
    "Plan",
    "PrecisionWarning",
    "Recipe",
    "RecordError",
    "RotatedCheckpoint",
    "Rotation",
    "RotationError",
    "Suggestion",
    "TransformArgs",
    "TransformConfig",
    "TransformScheme",
    "UncoveredParameterError",
    "UnknownArchitectureError",
    "UnsupportedRotationError",
    "Untouched",
    "ValueRangeError",
    "Verification",
    "__version__",
    "apply",
    "check",
    "export",
    "hadamard_matrix",
    "hadamard_transform",
    "learn",
    "plan",
    "read_spinquant",
    "remove",
    "restore",
    "rotate_checkpoint",
    "suggest_mapping",
    "verify",
]

_HOMES = {
    "AlreadyRotatedError": "checks",
    "Architecture": "mapping",
    "BusyModelError": "errors",
    "CheckpointError": "checkpoint.header",
    "ForeignCodeError": "foreign",
    "HadamardSizeError": "hadamard",
    "HalfRotatedError": "errors",
    "Handle": "handle",
    "Learned": "learning.learned",
    "Mapping": "mapping",
    "NoMatchError": "patterns",
    "NormMapping": "mapping",
    "Plan": "edits",
    "PrecisionWarning": "values",
    "Recipe": "recipe",
    "RecordError": "errors",
    "RotatedCheckpoint": "checkpoint.rotate",
    "Rotation": "rotations",
    "RotationError": "errors",
    "Suggestion": "suggest",
    "TransformArgs": "transform_config",
    "TransformConfig": "transform_config",
    "TransformScheme": "transform_config",
    "UncoveredParameterError": "coverage",
    "UnknownArchitectureError": "mapping",
    "UnsupportedRotationError": "rows",
    "Untouched": "mapping",
    "ValueRangeError": "values",
    "Verification": "verification",
    "apply": "api",
    "check": "fit",
    "export": "checkpoint.export",
    "hadamard_matrix": "hadamard",
    "learn": "learning.learner",
    "plan": "api",
    "read_spinquant": "learning.spinquant_file",
    "remove": "removal",
    "restore": "restoration",
    "rotate_checkpoint": "checkpoint.rotate",
    "suggest_mapping": "suggest",
    "verify": "verification",
}
"""The module of every name that is imported when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastrot' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastrot.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
