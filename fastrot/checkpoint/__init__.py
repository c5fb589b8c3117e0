"""Checkpoints that are rotated file by file, without loading the model."""
