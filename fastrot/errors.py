"""The one family of errors: whatever fastrot refuses is a ``RotationError``."""


class RotationError(ValueError):
    """Something that fastrot can't do exactly; the message says what can be done instead."""


class HalfRotatedError(RotationError):
    """A model whose weights were left rotated in part by an error that nobody foresaw."""


class BusyModelError(RotationError):
    """A model that another thread is rotating."""


class RecordError(RotationError):
    """A record of what was done to a checkpoint that can't be trusted, or does not fit it."""
