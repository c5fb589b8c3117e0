"""The laboratory: simulated quantization of a model, and what rotations do to it, measured."""
