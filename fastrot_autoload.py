"""Rotated checkpoints in processes that never import fastrot, such as ``transformers serve``.

torch calls :func:`autoload` at the end of ``import torch`` (entry point group ``torch.backends``).
A module of its own, as importing one of fastrot's would import all that fastrot needs.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

MODELS = "transformers.modeling_utils"


def autoload() -> None:
    """With ``FASTROT_AUTOLOAD=1``, import fastrot when transformers' models are; else nothing."""
    if os.environ.get("FASTROT_AUTOLOAD") == "1":
        sys.meta_path.insert(0, _Trigger())


class _Trigger(MetaPathFinder):
    """Finds nothing; imports fastrot, once, before what it waits for is found by others."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        # Where torch is first imported by MODELS itself, that has to be executed to its end before.
        complete = hasattr(sys.modules.get(MODELS), "ALL_ATTENTION_FUNCTIONS")
        if fullname != MODELS and not (complete and fullname.startswith("transformers.models.")):
            return None
        sys.meta_path.remove(self)
        try:
            import fastrot  # noqa: F401
        except Exception as error:
            import logging

            logging.getLogger("fastrot").warning("FASTROT_AUTOLOAD=1, but no fastrot: %r", error)
        # Anew, as fastrot has put a finder before all others.
        return find_spec(fullname)
