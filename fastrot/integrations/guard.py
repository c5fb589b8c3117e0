"""A model whose configuration records online rotations refuses to run without them.

``from_pretrained`` puts them on; a model that was built from the configuration in another way, or
loaded without the mark of the checkpoint, would compute nonsense from rotated weights.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastrot.edits import OnlineSite
from fastrot.errors import RecordError
from fastrot.online import rotation_at
from fastrot.record import has_online, online_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAFTS = "MtpModel"
"""transformers' class for drafts, which takes the configuration of the model it drafts for; nothing
inside is rotated."""


VLLM = "vllm"
"""The attention implementation of models that vLLM builds; there its plugin rotates, and checks."""


def guard(model: "PreTrainedModel") -> None:
    """Let a model that is being built refuse to run, if its record names online rotations.

    Raises:
        RecordError: it is being loaded from what :func:`fastrot.export` wrote of plain numbers,
            where transformers finds no quantization, and would fail.
    """
    if type(model).__name__ == DRAFTS or model.config._attn_implementation == VLLM:
        return
    try:
        needed = has_online(model.config)
    except RecordError:
        needed = True  # The first forward says what is wrong with it.
    described = getattr(model.config, "quantization_config", None)
    if needed and described is not None and _empty(described):
        raise RecordError(
            "this checkpoint was exported for a server that rotates by itself (fastrot.export), "
            "and transformers can't load it; load the checkpoint that it was exported from"
        )
    if needed:
        model.register_forward_pre_hook(refuse)


def _empty(described: Any) -> bool:
    """Whether transformers reads a description of compressed-tensors that quantizes nothing."""
    return getattr(described, "quantization_config", described) is None


def lift(model: "PreTrainedModel") -> None:
    """Let a model run whose rotations are on; the models inside it have guards of their own."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is refuse:
                del module._forward_pre_hooks[key]


def missing(model: "PreTrainedModel") -> list[OnlineSite]:
    """The online rotations that the record names and the model does not have."""
    return [site for site in online_sites(model) if rotation_at(model, site) is None]


def check_complete(model: "PreTrainedModel") -> None:
    """Refuse a model without its recorded online rotations.

    Raises:
        RecordError: names the first that is missing, and the way out.
    """
    sites = missing(model)
    if sites:
        first = sites[0]
        raise RecordError(
            f"the weights of this {type(model).__name__} are rotated, but {len(sites)} of the "
            f"online rotations that its configuration records are not on it, {first.group} on the "
            f"{first.location} of {first.module} first; call fastrot.restore(model), or load it "
            "with from_pretrained"
        )


def check_recorded(model: "PreTrainedModel", unexpected: Iterable[str]) -> None:
    """Refuse a checkpoint with online rotations that has no record of them.

    Args:
        model: it is being loaded; with a record, its first forward asks for the rotations.
        unexpected: names of tensors in the checkpoint that it has no place for.

    Raises:
        RecordError: names a rotation, and the way out.
    """
    lost = sorted(name for name in unexpected if ".fastrot_" in name)
    if lost and getattr(model.config, "fastrot", None) is None:
        raise RecordError(
            f"the checkpoint has online rotations, {lost[0]} ({len(lost)}), and config.json has no "
            "record of them ('fastrot'): a tool wrote it anew, or from the original model; add "
            "the entry 'fastrot' of the config.json that was written after rotating"
        )


def refuse(model: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a model that was built without its online rotations."""
    check_complete(model)
    lift(model)
