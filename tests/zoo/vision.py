"""Language models that see."""

from zoo import Family

FAMILIES: dict[str, Family] = {}
