"""The online part of a plan: rotations of activations, as submodules that can be taken off."""

from fastrot.online.attention import check_attention
from fastrot.online.install import (
    acts_on,
    attach,
    check_parts,
    check_site,
    installed,
    make,
    rotation_at,
    uninstall,
)
from fastrot.online.rotation import OnlineRotation

__all__ = [
    "OnlineRotation",
    "acts_on",
    "attach",
    "check_attention",
    "check_parts",
    "check_site",
    "installed",
    "make",
    "rotation_at",
    "uninstall",
]
