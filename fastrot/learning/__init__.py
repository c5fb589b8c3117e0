"""Learned rotations: orthogonal matrices fitted to what a scheme does to a model."""
