"""``fastrot.restore``: the online rotations of a model that was loaded without them."""

from typing import TYPE_CHECKING

import torch

from fastrot.checks import check_kind, quant_method
from fastrot.errors import RotationError
from fastrot.foreign import check_whole
from fastrot.integrations.guard import lift, missing
from fastrot.integrations.marks import mark
from fastrot.journal import Journal, exclusive
from fastrot.memory import on_cpu
from fastrot.online import attach, check_site, installed, make
from fastrot.record import QUANT_METHOD, check_online, online_sites, own_config, retrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode(False)
def restore(model: "PreTrainedModel") -> None:
    """Put the recorded online rotations on a model that was built or loaded without them.

    ``from_pretrained`` needs no such help. Other ways do: ``from_config`` with
    ``load_state_dict`` or accelerate's ``load_checkpoint_and_dispatch``, or ``from_pretrained``
    with a configuration that lost its ``quantization_config``. It may be called before the weights
    are loaded, which then must bring the operands along, or after. Where all rotations are on
    nothing is done.

    Args:
        model: its configuration holds the record, ``config.fastrot``.

    Raises:
        RotationError: there is no record of online rotations, the model has some of them or others,
            is a part of a larger one, or a rotation can't act in it. The model is untouched.
    """
    check_kind(model)
    check_whole(model, trust=True)
    with exclusive(model), on_cpu():
        _restore(model)


def _restore(model: "PreTrainedModel") -> None:
    sites = online_sites(model)
    if not sites:
        raise RotationError(
            f"the configuration of this {type(model).__name__} records no online rotation; there "
            "is nothing to restore"
        )
    there = sum(1 for _ in installed(model))
    if not missing(model) and there == len(sites):
        lift(model)
        return
    if there:
        raise RotationError(
            f"this {type(model).__name__} has {there} online rotations, its record names "
            f"{len(sites)}; load it anew with from_pretrained"
        )
    for site in sites:
        check_site(model, site)
    rotations = make(model, sites)
    with Journal() as journal:
        config = own_config(model, journal)
        attach(model, sites, rotations, journal)
        if quant_method(config) in (None, QUANT_METHOD):
            mark(config)
        if not any(rotation.operand.is_meta for rotation in rotations):
            check_online(model)
        retrace()
    lift(model)
