"""What was done to a model, written into its configuration so that it is saved with the weights.

``config.fastrot`` holds a list of applications, each with its seed and transform configuration.
From these and the names and sizes of the modules the online part can be put on again.
"""

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from fastrot.edits import OnlineSite, Plan
from fastrot.errors import HalfRotatedError, RotationError
from fastrot.journal import Journal
from fastrot.resolve import resolve_online
from fastrot.transform_config import TransformConfig, parse_transform_config

FORMAT = 1
QUANT_METHOD = "fastrot"


def applications(config: Any) -> list[tuple[int, TransformConfig]]:
    """Seed and transform configuration of every application recorded in a model's configuration.

    Raises:
        RotationError: the record is of a newer format, or says that the weights are damaged.
    """
    record = getattr(config, "fastrot", None)
    if record is None:
        return []
    if record.get("damaged"):
        raise HalfRotatedError(
            "an error left the weights of this model rotated in part; start from the original "
            "weights"
        )
    if record.get("format") != FORMAT:
        raise RotationError(
            f"the model was rotated by a fastrot that writes format {record.get('format')}; this "
            f"one reads format {FORMAT}, install a newer fastrot"
        )
    return [
        (int(item["seed"]), parse_transform_config(item["transform_config"]))
        for item in record["applied"]
    ]


def applied_groups(config: Any) -> list[str]:
    """Names of all rotations on a model, for example ``["R1", "R2"]``."""
    return [name for _, item in applications(config) for name in item.config_groups]


def online_sites(model: PreTrainedModel) -> list[OnlineSite]:
    """The online rotations that a model's record asks for."""
    return [
        site
        for seed, config in applications(model.config)
        for site in resolve_online(model, config, seed)
    ]


def with_application(config: Any, plan: Plan) -> dict[str, Any]:
    """A copy of the record in ``config``, with ``plan`` added."""
    old = getattr(config, "fastrot", None)
    record: dict[str, Any] = (
        {"format": FORMAT, "applied": []} if old is None else copy.deepcopy(old)
    )
    record["applied"].append(
        {"seed": plan.seed, "transform_config": plan.transform_config.to_dict()}
    )
    return record


def without_groups(config: Any, groups: Iterable[str]) -> dict[str, Any]:
    """A copy of the record without these rotations."""
    record: dict[str, Any] = copy.deepcopy(config.fastrot)
    for item in record["applied"]:
        for name in groups:
            item["transform_config"]["config_groups"].pop(name, None)
    record["applied"] = [
        item for item in record["applied"] if item["transform_config"]["config_groups"]
    ]
    return record


def own_config(model: PreTrainedModel, journal: Journal) -> Any:
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
