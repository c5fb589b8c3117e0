"""What a checkpoint's record asks of a server, by transformers' names. Nothing here needs vLLM."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastrot.edits import OnlineSite
from fastrot.integrations.marks import unmark
from fastrot.integrations.outlines import model_of
from fastrot.online.parallel import check_width
from fastrot.record import applications, online_sites
from fastrot.resolve.places import places
from fastrot.sites import holds_itself

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DELEGATED = ("compressed-tensors",)
"""Quantization methods of other tools before which a rotation can stand."""


def recorded_sites(config: Any) -> list[OnlineSite]:
    """The online rotations that the record in a model's configuration asks for.

    Experts are called what the checkpoint calls them: Mixtral's are ``block_sparse_moe`` there, as
    in vLLM, and ``mlp`` in transformers.
    """
    model = recorded_model(config)
    return [_as_stored(model, site) for site in online_sites(model)]


def split_sites(config: Any) -> list[OnlineSite]:
    """Those of which tensor parallelism may leave a rank a part of every vector.

    They are inputs of linear layers and experts. Attention has whole heads, and every rank the
    whole stream at norms and decoder layers.
    """
    model = recorded_model(config)
    return [_as_stored(model, site) for site in online_sites(model) if _is_split(model, site)]


def _is_split(model: "PreTrainedModel", site: OnlineSite) -> bool:
    if site.location == "input":
        return not holds_itself(site.module, model.get_submodule(site.module))
    return site.location == "down_input"


def _as_stored(model: "PreTrainedModel", site: OnlineSite) -> OnlineSite:
    if site.location != "down_input":
        return site
    return replace(site, module=_stored(model, site))


def _stored(model: "PreTrainedModel", site: OnlineSite) -> str:
    from transformers.core_model_loading import revert_weight_conversion

    end = f".fastrot_{site.location}.operand"
    name = f"{site.module}{end}"
    stored = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return next(iter(stored)).removesuffix(end)


def recorded_model(config: Any) -> "PreTrainedModel":
    """The model of a configuration without its marks, its names and shapes alone."""
    plain = copy.deepcopy(config)
    unmark(plain)
    return model_of(plain)


def exported(config: Any, settings: Mapping[str, Any]) -> bool:
    """Whether vLLM itself does all recorded online rotations, as :func:`fastrot.export` writes.

    Args:
        config: of the model.
        settings: its ``quantization_config``.
    """
    groups = (settings.get("transform_config") or {}).get("config_groups", {})
    carried = {name.partition("_")[0] for name in groups}
    recorded = {
        group for _, item in applications(config) for group, _, _ in places(item, online=True)
    }
    return recorded <= carried


def check_ranks(sites: Iterable[OnlineSite], ranks: int) -> None:
    """Refuse tensor parallelism that would cut a block of a rotation in two.

    Args:
        sites: whose vectors are split.
        ranks: on how many it is split.

    Raises:
        RotationError: names the first site, and block sizes that work.
    """
    for site in sites:
        # Where the ranks do not divide the size, the server refuses by itself.
        if site.rotation.size % ranks == 0:
            on_rank(site, site.rotation.size // ranks)


def on_rank(site: OnlineSite, width: int) -> OnlineSite:
    """The site as a rank sees it that has ``width`` entries of every vector.

    Raises:
        RotationError: the rank would have a part of a block; names block sizes that work.
    """
    rotation = site.rotation
    check_width(site.module, site.group, rotation, width)
    return replace(site, rotation=replace(rotation, size=width, block_size=rotation.block))
