"""Tensors that transformers does not load, such as those of multi-token prediction."""

import re
from typing import TYPE_CHECKING, Any, Literal

from fastrot.checkpoint.header import CheckpointError
from fastrot.checkpoint.trace import Trace
from fastrot.edits import Plan
from fastrot.errors import RotationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Drafts = Literal["copy", "drop"]
"""What is done with the tensors of multi-token prediction, which transformers does not load."""

DRAFT = re.compile(r"(^|\.)mtp\w*\.|(^|\.)layers\.(?P<layer>\d+)\.")
"""Names of the tensors of multi-token prediction: of their own, or of layers behind the last."""


def is_draft(name: str, config: Any) -> bool:
    """Whether a tensor belongs to multi-token prediction, by its name."""
    found = DRAFT.search(name)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return found is not None and (found["layer"] is None or int(found["layer"]) >= layers)


def leftovers(model: "PreTrainedModel", plan: Plan, made: Trace, drafts: Drafts) -> list[str]:
    """The tensors that the model does not have and the new checkpoint keeps; others refuse."""
    drafted = [name for name in made.unknown if is_draft(name, model.config)]
    strange = [n for n in made.unknown if n not in drafted and n not in made.ignored]
    if strange:
        raise CheckpointError(
            f"the checkpoint has {strange[0]} ({len(strange)} such tensors), which a "
            f"{type(model).__name__} does not have; nothing is dropped in silence, remove them "
            "from the checkpoint if nothing reads them"
        )
    if drafted and drafts == "copy" and not _keeps_ends(model, plan):
        raise RotationError(
            f"the checkpoint has {len(drafted)} tensors of multi-token prediction, {drafted[0]} "
            "first, that read the embedding, the last norm and the head, which R1 changes; they "
            "are copied as they are if R1 leaves these alone (keep_head=True, --keep-head) or is "
            "left out; or drop them (--mtp drop)"
        )
    return [n for n in made.unknown if n not in drafted or drafts == "copy"]


def _keeps_ends(model: "PreTrainedModel", plan: Plan) -> bool:
    """Whether a plan leaves what a draft shares with the model as it is."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = {id(end.weight) for end in ends if end is not None}
    named = model.named_parameters(remove_duplicate=False)
    return not any(id(weight) in shared and name in plan.parameters for name, weight in named)
