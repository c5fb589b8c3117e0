r"""Concrete names to patterns: ``model.layers.3.mlp.up_proj`` to ``re:.*\.mlp\.up_proj$``."""

import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from fastrot.mapping import Patterns
from fastrot.patterns import matches


class Names:
    """The names of a model's modules and parameters.

    Args:
        model: only members of a ``ModuleList`` count as alike; other numbers are names.
    """

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def general(self, name: str) -> str:
        """The regular expression of a name, any index for that of a list."""
        return r"\.".join(self._parts(name))

    def patterns(self, names: Iterable[str], leaves: bool = False) -> Patterns:
        """Patterns, as short as they can be without matching any other name.

        Args:
            names: of modules or parameters.
            leaves: the names are sought among parameters only.
        """
        groups: dict[str, dict[str, None]] = defaultdict(dict)
        for name in names:
            groups[self.general(name)][name] = None
        return tuple(pattern for group in groups.values() for pattern in self._of(group, leaves))

    def _of(self, group: Iterable[str], leaves: bool) -> Patterns:
        wanted, universe = (
            [*group],
            self.parameters if leaves else [*self.modules, *self.parameters],
        )
        parts = self._parts(wanted[0])
        if len(parts) == 1:
            return tuple(wanted)
        start = parts.index(r"\d+") + 1 if r"\d+" in parts[:-1] else len(parts) - 1
        classes = {type(self.modules.get(name)) for name in wanted}
        tries = [rf"re:.*\.{self._join(parts[i:])}$" for i in range(start, 0, -1)]
        tries += [f"re:{self._join(parts)}$", *(found.__name__ for found in classes)]
        for pattern in tries:
            if sorted(wanted) == sorted(
                name for name in universe if matches(name, pattern, self.modules.get(name))
            ):
                return (pattern,)
        return tuple(wanted)

    def _parts(self, name: str) -> list[str]:
        parts, owner = [], ""
        for part in name.split("."):
            listed = isinstance(self.modules.get(owner), nn.ModuleList)
            parts.append(r"\d+" if listed else re.escape(part))
            owner = f"{owner}.{part}" if owner else part
        return parts

    @staticmethod
    def _join(parts: list[str]) -> str:
        return r"\.".join(parts)
