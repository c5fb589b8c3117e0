"""What was done to a model, written into its configuration so that it is saved with the weights.

``config.fastrot`` holds a list of applications, each with its seed and transform configuration.
From these and the names and sizes of the modules the online part can be put on again. Since format
2 it also holds a digest of that part, places and operands, and a checksum of all that it holds;
format 1, of version 0.1.0, is read without them.
"""

import copy
import hashlib
import json
import operator
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrot.edits import OnlineSite, Plan
from fastrot.errors import HalfRotatedError, RecordError
from fastrot.journal import Journal
from fastrot.online import OnlineRotation, acts_on, installed
from fastrot.resolve import resolve_online
from fastrot.resolve.places import places
from fastrot.transform_config import TransformConfig, parse_transform_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 2
QUANT_METHOD = "fastrot"
BROKEN = (
    "the record of rotations in the configuration (config.json, 'fastrot') was edited or damaged; "
    "take the checkpoint as it was written"
)


def applications(config: Any) -> list[tuple[int, TransformConfig]]:
    """Seed and transform configuration of every application recorded in a model's configuration.

    Raises:
        RecordError: the record is of a newer format, or was edited.
        HalfRotatedError: it says that the weights are damaged.
    """
    record = getattr(config, "fastrot", None)
    if record is None:
        return []
    _check(record)
    try:
        return [(operator.index(item["seed"]), _in_order(item)) for item in record["applied"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{BROKEN}: {type(error).__name__}: {error}") from error


def ordered(config: Any) -> bool:
    """Whether the record says in which order its rotations act where several do."""
    return all("order" in item for item in config.fastrot["applied"])


def _in_order(item: dict[str, Any]) -> TransformConfig:
    """The configuration, its rotations as they were applied: JSON files sort their names."""
    found = parse_transform_config(item["transform_config"])
    groups = found.config_groups
    order = item.get("order", [*groups])
    if sorted(order) != sorted(groups):
        raise ValueError(f"order {order!r:.60} is not that of {', '.join(groups)}")
    return TransformConfig({name: groups[name] for name in order})


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise RecordError(f"{BROKEN}: it is {record!r:.40}")
    if record.get("damaged"):
        raise HalfRotatedError(
            "an error left the weights of this model rotated in part; start from the original "
            "weights"
        )
    form = record.get("format")
    if form == 1 and not isinstance(record.get("applied"), list):
        raise RecordError(f"{BROKEN}: 'applied' is no list")
    if form not in (1, FORMAT):
        raise RecordError(
            f"the model was rotated by a fastrot that writes format {form!r:.40}; this one reads "
            f"formats 1 and {FORMAT}, install a newer fastrot"
        )
    if form != 1 and record.get("checksum") != _checksum(record):
        raise RecordError(f"{BROKEN}: it does not have the checksum it was written with")


def _checksum(record: dict[str, Any]) -> str:
    return _sha256({name: value for name, value in record.items() if name != "checksum"})


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def sealed(record: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The record, bound to the online rotations that are on the model, and to itself."""
    record = {**record, "format": FORMAT, "online": _online_digest(model)}
    return {**record, "checksum": _checksum(record)}


def _online_digest(model: nn.Module) -> str:
    """Of all online rotations, by places that do not depend on the model around the layers."""
    entries = []
    for holder, _, rotation in installed(model):
        # As in version 0.1.0, where every rotation lay on the module that it acts on.
        parts = f"{acts_on(holder, rotation)}.fastrot_{rotation.location}".split(".")
        start = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        operand = _digested(rotation)
        described = [rotation.group, rotation.inverse, str(rotation.dtype), str(rotation.rotation)]
        digest = hashlib.sha256(operand).hexdigest()
        entries.append([".".join(parts[max(start - 1, 0) :]), *described, digest])
    return _sha256(sorted(entries))


def _digested(rotation: OnlineRotation) -> bytes:
    """The operand; that of ``hadamard`` is described by the rotation."""
    value = rotation.held() if rotation.rotation.has_operand else torch.ones(1, dtype=torch.int8)
    return value.detach().cpu().contiguous().numpy().tobytes()


def check_online(model: "PreTrainedModel") -> None:
    """Refuse online rotations, loaded from a checkpoint, that are not those of its record.

    Raises:
        RecordError: names the first that is not, or says that there are more, or fewer.
    """
    for name, module in model.named_modules():
        if not isinstance(module, OnlineRotation):
            continue
        problem = module.problem()
        if problem is None:
            continue
        raise RecordError(
            f"the operand of {module.group}, {name} ({module.rotation}), {problem}; save the model "
            "again"
        )
    record: Any = model.config.fastrot
    if record["format"] != 1 and record["online"] != _online_digest(model):
        raise RecordError(
            f"the online rotations of this {type(model).__name__} are not those that it was saved "
            "with: its layers, their sizes, or a random matrix differ; save the model again, or "
            "take the rotations off (fastrot.remove) before its layers are changed"
        )


def applied_groups(config: Any) -> list[str]:
    """Names of all rotations on a model, for example ``["R1", "R2"]``."""
    return [name for _, item in applications(config) for name in item.config_groups]


def has_online(config: Any) -> bool:
    """Whether the record in a model's configuration asks for any online rotation."""
    return any(True for _, item in applications(config) for _ in places(item, online=True))


def online_sites(model: "PreTrainedModel") -> list[OnlineSite]:
    """The online rotations that a model's record asks for."""
    return [
        site
        for seed, config in applications(model.config)
        for site in resolve_online(model, config, seed)
    ]


def with_application(config: Any, plan: Plan) -> dict[str, Any]:
    """A copy of the record in ``config``, with ``plan`` added."""
    old = getattr(config, "fastrot", None)
    record: dict[str, Any] = {"applied": []} if old is None else copy.deepcopy(old)
    groups = plan.transform_config.to_dict()
    order = [*groups["config_groups"]]
    record["applied"].append({"seed": plan.seed, "transform_config": groups, "order": order})
    return record


def without_groups(config: Any, groups: Iterable[str]) -> dict[str, Any]:
    """A copy of the record without these rotations."""
    record: dict[str, Any] = copy.deepcopy(config.fastrot)
    for item in record["applied"]:
        for name in groups:
            item["transform_config"]["config_groups"].pop(name, None)
        if "order" in item:
            item["order"] = [name for name in item["order"] if name not in groups]
    record["applied"] = [
        item for item in record["applied"] if item["transform_config"]["config_groups"]
    ]
    return record


def own_config(model: "PreTrainedModel", journal: Journal) -> Any:
    """Give the model its own configuration: another may have been built from the same one."""
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    for module in model.modules():
        old = module.__dict__.get("config")
        if id(old) in copies:
            journal.set(module, "config", copies[id(old)])
    return config


def retrace() -> None:
    """Let compiled models be traced anew: they do not look for hooks that came later."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
