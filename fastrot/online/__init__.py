"""The online part of a plan: rotations of activations, as submodules that can be taken off."""

from fastrot.online.attention import IMPLEMENTATIONS, attention_forward, check_attention
from fastrot.online.install import attach, check_site, installed, make, uninstall
from fastrot.online.rotation import OnlineRotation

__all__ = [
    "IMPLEMENTATIONS",
    "OnlineRotation",
    "attach",
    "attention_forward",
    "check_attention",
    "check_site",
    "installed",
    "make",
    "uninstall",
]
