"""Decoders in which not every block is attention: state-space and linear-attention layers."""

from fastrot.mapping.roles import Architecture

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {}
