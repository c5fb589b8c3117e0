"""A small language model trained by this package, and what rotations do to it."""
