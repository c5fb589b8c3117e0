"""Rotate language models so that they survive 4-bit quantization, exactly.

Importing fastrot registers its names with transformers, so that ``from_pretrained`` knows rotated
checkpoints.
"""

from fastrot.api import apply, plan
from fastrot.checks import AlreadyRotatedError
from fastrot.coverage import UncoveredParameterError
from fastrot.edits import Plan
from fastrot.errors import BusyModelError, HalfRotatedError, RecordError, RotationError
from fastrot.foreign import ForeignCodeError
from fastrot.hadamard import HadamardSizeError, hadamard_matrix
from fastrot.handle import Handle
from fastrot.integrations.transformers import register
from fastrot.kernels import hadamard_transform
from fastrot.mapping import Architecture, Mapping, NormMapping, UnknownArchitectureError, Untouched
from fastrot.patterns import NoMatchError
from fastrot.removal import remove
from fastrot.rotation import Rotation
from fastrot.rows import UnsupportedRotationError
from fastrot.suggest import Suggestion, suggest_mapping
from fastrot.transform_config import TransformArgs, TransformConfig, TransformScheme
from fastrot.values import PrecisionWarning, ValueRangeError
from fastrot.version import __version__

__all__ = [
    "AlreadyRotatedError",
    "Architecture",
    "BusyModelError",
    "ForeignCodeError",
    "HadamardSizeError",
    "HalfRotatedError",
    "Handle",
    "Mapping",
    "NoMatchError",
    "NormMapping",
    "Plan",
    "PrecisionWarning",
    "RecordError",
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
    "__version__",
    "apply",
    "hadamard_matrix",
    "hadamard_transform",
    "plan",
    "remove",
    "suggest_mapping",
]

register()
