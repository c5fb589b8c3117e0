"""A model whose weights were lost half way refuses to run, to be saved as rotated, or rotated."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from fastrot.errors import HalfRotatedError
from fastrot.integrations.marks import mark
from fastrot.journal import Journal
from fastrot.record import FORMAT, own_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mark_damaged(model: "PreTrainedModel", parameters: Iterable[str]) -> None:
    """Let every module that owns one of the parameters raise when it is called.

    A checkpoint that is saved all the same carries the mark in its config.json: loading it raises
    too.
    """
    config = own_config(model, Journal())
    config.fastrot = {"format": FORMAT, "damaged": True}
    mark(config)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
        model.get_submodule(name).register_forward_pre_hook(_refuse)


def _refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise HalfRotatedError(
        f"an error left the weights of this model rotated in part ({type(module).__name__} among "
        "them), and there were no copies; load the model anew"
    )
