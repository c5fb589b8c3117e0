"""Mapping, configuration and model → :class:`~fastrot.edits.Plan`. Reads, never writes."""

from fastrot.resolve.online import resolve_online
from fastrot.resolve.plan import on_meta, resolve

__all__ = ["on_meta", "resolve", "resolve_online"]
