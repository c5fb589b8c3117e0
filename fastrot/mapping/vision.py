"""Shells around language models: what else writes into the residual stream."""

from fastrot.mapping.roles import Architecture, Shell

SHELLS: dict[str, Shell] = {}

ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {}
