"""Mixtures of experts, with RMSNorm."""

from fastrot.mapping.roles import Architecture

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {}
