"""``Handle``: what :func:`fastrot.apply` did, and the way to take its online part off."""

from typing import TYPE_CHECKING, Any

from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.mapping import STREAM
from fastrot.removal import remove

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Handle:
    """The result of :func:`fastrot.apply`; ``print(handle)`` shows the plan as a table.

    Attributes:
        model: the rotated model.
        plan: what was done, as data.
    """

    def __init__(self, model: "PreTrainedModel", plan: Plan):
        self.model = model
        self.plan = plan

    @property
    def transform_config(self) -> dict[str, Any]:
        """The rotations in the schema of compressed-tensors' ``TransformConfig``."""
        return self.plan.transform_config.to_dict()

    def remove(self, *, trust: bool = False) -> None:
        """Take the online rotations of this application off, see :func:`fastrot.remove`."""
        groups = dict.fromkeys(site.group for site in self.plan.online if site.group != STREAM)
        if not groups:
            raise RotationError("nothing of this is online: what it did is in the weights, to stay")
        remove(self.model, groups, trust=trust)

    def __str__(self) -> str:
        return str(self.plan)
