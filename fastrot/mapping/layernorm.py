"""Decoders with LayerNorm."""

from fastrot.mapping.roles import Architecture

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {}
