"""Online rotations on a checkpoint that was quantized after rotating, while it is loaded.

Its quantization method is that of the tool, so transformers calls the tool's quantizer and not
fastrot's. The rotations are put on between the two halves of any quantizer: behind what it makes
of the modules, so that its patterns of names do not find them, and before the weights are loaded,
so that the file's operands are.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastrot.checks import quant_method
from fastrot.errors import RecordError
from fastrot.integrations.guard import DRAFTS, lift
from fastrot.integrations.marks import mark
from fastrot.journal import Journal
from fastrot.online import OnlineRotation, attach, check_parts, check_site, installed, make
from fastrot.record import QUANT_METHOD, check_online, has_online, online_sites, retrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastrot.edits import OnlineSite


def put_on(model: "PreTrainedModel", sites: "list[OnlineSite]") -> list[OnlineRotation]:
    """Put rotations on a model that has no weights yet.

    Raises:
        RotationError: one can't act in it. The model has none.
    """
    for site in sites:
        check_site(model, site)
    with Journal() as journal:
        rotations = make(model, sites)
        attach(model, sites, rotations, journal)
    return rotations


def check_named(unexpected: Iterable[str]) -> None:
    """Refuse operands that a checkpoint has and its record does not ask for.

    Raises:
        RecordError: names the first.
    """
    lost = [name for name in unexpected if ".fastrot_" in name]
    if lost:
        raise RecordError(
            f"the checkpoint has online rotations that its record does not name, {lost[0]} "
            f"({len(lost)}); take the checkpoint as it was written"
        )


def before_weights(model: "PreTrainedModel") -> None:
    """Put the recorded rotations on a model that a quantizer has prepared for its weights.

    Raises:
        RotationError: one can't act in what the quantizer made of the model.
    """
    if not _ours(model):
        return
    sites = online_sites(model)
    rotations = put_on(model, sites)

    def adjust(info: Any) -> None:
        """Make the operands that the file lacks, as tools may leave them out."""
        del model._adjust_missing_and_unexpected_keys
        names = {module: name for name, module in model.named_modules()}
        for site, rotation in zip(sites, rotations, strict=True):
            name = f"{names[rotation]}.operand"
            if name in info.missing_keys:
                info.missing_keys.remove(name)
                rotation.operand = make(model, [site], rotation.operand.device)[0].operand
        model._adjust_missing_and_unexpected_keys(info)
        check_named(info.unexpected_keys)

    model._adjust_missing_and_unexpected_keys = adjust  # type: ignore[method-assign, assignment]


def after_weights(model: "PreTrainedModel") -> None:
    """Leave a model whose weights are loaded as :func:`fastrot.restore` would.

    Raises:
        RecordError: the operands are not those of the record.
    """
    if not _ours(model) or not any(installed(model)):
        return
    if quant_method(model.config) is None:
        mark(model.config)  # The quantizer dequantized.
    check_online(model)
    check_parts(model)
    retrace()
    lift(model)


def _ours(model: "PreTrainedModel") -> bool:
    """Whether a quantizer of another project loads a model with online rotations."""
    if type(model).__name__ == DRAFTS or quant_method(model.config) == QUANT_METHOD:
        return False
    return has_online(model.config)
