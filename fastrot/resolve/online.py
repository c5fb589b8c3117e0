"""The online part: which module's input or output is rotated at run time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from fastrot.edits import OnlineSite
from fastrot.errors import RotationError
from fastrot.heads import KEY_NAMES, head_around, head_size, lender_of, lenders_of
from fastrot.index import Index, find_holders, find_modules
from fastrot.resolve.places import places, rotation_of
from fastrot.rotations import Rotation
from fastrot.sites import holds_itself, site_of
from fastrot.transform_config import (
    ATTENTION_LOCATIONS,
    TransformArgs,
    TransformConfig,
    TransformScheme,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_online(
    model: "PreTrainedModel | Index", config: TransformConfig, seed: int
) -> list[OnlineSite]:
    """The online part alone; needs the names and sizes of modules, no weights."""
    index = Index.of(model)
    lenders = lenders_of(index)

    def rotation(
        group: str, scheme: TransformScheme, args: TransformArgs, module: str, size: int
    ) -> Rotation:
        by_heads = args.rows == "heads"
        shared = by_heads or args.location in ATTENTION_LOCATIONS
        at = lender_of(lenders, module) if shared else module
        head = head_around(index, module) if by_heads else None
        return rotation_of(index, group, scheme, at, size, seed, head)

    sites = [
        OnlineSite(
            module=module,
            location=location,
            rotation=rotation(group, scheme, args, module, size),
            inverse=args.inverse,
            group=group,
            dtype=scheme.precision,
        )
        for group, scheme, args in places(config, online=True)
        for module, location, size in _online_places(index, group, args)
        # Keys that a layer takes from another are rotated where they are made.
        if location != "k_cache" or module not in lenders
    ]
    taken: dict[tuple[str, str], str] = {}
    for site in sites:
        other = taken.setdefault((site.module, site.location), site.group)
        if other != site.group:
            raise RotationError(
                f"{site.group} and {other} both act on the {site.location} of {site.module}; "
                "give each place one online transform"
            )
    return sites


def _online_places(index: Index, group: str, args: TransformArgs) -> Iterator[tuple[str, str, int]]:
    """Module, location and size of every place that ``args`` name."""
    if args.location in ATTENTION_LOCATIONS:
        config = index.model.config.get_text_config()  # type: ignore[union-attr, operator]
        for name, module in find_modules(index, args.targets, args.ignore).items():
            size = head_size(module, config, KEY_NAMES)
            if size is None:
                raise RotationError(f"{name} ({type(module).__name__}) has no head_dim to rotate")
            yield name, args.location, size
        return
    if args.location == "output":
        for name, module in find_modules(index, args.targets, args.ignore).items():
            yield name, "output", _output_size(group, name, module)
        return
    for name, holder in find_holders(index, args.targets, args.ignore).items():
        if isinstance(holder, nn.Module) and holds_itself(name, holder):
            yield name, "input", _stream_size(index, group, name, holder)
            continue
        size = getattr(holder, "in_features", None)
        if isinstance(size, int):
            # A quantizer may have packed the weight.
            yield name, "input", size
            continue
        site = site_of(index, name, holder, group=group)
        if site.input is None:
            raise RotationError(f"{group}: {name} is an embedding, it has no input to rotate")
        size = site.shape[site.input]
        if not site.is_bare:
            yield name, "input", size
        elif len(site.shape) == 3 and name.endswith(".down_proj"):
            yield name.rpartition(".")[0], "down_input", size
        else:
            raise RotationError(
                f"{group}: {name} is a bare parameter, the input of which no online transform can "
                "reach"
            )


def _stream_size(index: Index, group: str, name: str, module: nn.Module) -> int:
    """The size of what goes into a norm, or into a layer as a whole."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        return weight.numel()
    size = getattr(index.config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise RotationError(
            f"{group}: {name} is a {type(module).__name__}, and the configuration names no "
            "hidden_size for its input"
        )
    return size


def _output_size(group: str, name: str, module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return weight.numel()
    size = getattr(module, "out_features", None)
    if not isinstance(size, int):
        raise RotationError(
            f"{group}: {name} is a {type(module).__name__}; an output transform needs an "
            "nn.Linear or a norm, whose size is known"
        )
    return size
