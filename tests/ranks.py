"""What one process of a distributed model does for ``test_parallel.py``: a script for torchrun.

Every cell is a JSON object with the relative error of the logits, and whether tokens are the same,
beside the model that is neither rotated nor distributed; or with the refusal.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import logits, relative_error
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

import fastrot
from fastrot.online import OnlineRotation

COLUMNS = (*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def load(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def by_hand(folder: Path, mesh: DeviceMesh, local: bool) -> nn.Module:
    plan: dict[str, object] = {
        f"model.layers.*.{name}": ColwiseParallel(use_local_output=local or "attn" in name)
        for name in COLUMNS
    }
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ROWS}
    return parallelize_module(load(folder), mesh, plan)


def sharded(folder: Path, mesh: DeviceMesh) -> nn.Module:
    model = load(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def without_rotating(folder: Path) -> nn.Module:
    """The control: what the error is if nothing acts online."""
    model = load(folder, tp_plan="auto")
    for module in model.modules():
        if isinstance(module, OnlineRotation):
            module.forward = lambda x, part=False: x
    return model


def rotated_late(folder: Path, mesh: DeviceMesh) -> nn.Module:
    model = sharded(folder, mesh)
    fastrot.apply(model)
    return model


def cell(name: str, make, original: nn.Module) -> dict[str, object]:
    ids = torch.arange(3, 15).view(1, 12)
    try:
        model = make()
        error = relative_error(logits(model, ids), logits(original, ids))
        length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        same = torch.equal(model.generate(ids, **length), original.generate(ids, **length))
    except fastrot.RotationError as refusal:
        return {"cell": name, "refusal": str(refusal)}
    return {"cell": name, "error": error, "same": same}


def makes_of(folders: Path, mesh: DeviceMesh) -> dict[str, Callable[[], nn.Module]]:
    """Every way to distribute the models of a family."""
    makes = {f"auto {path.name}": partial(load, path, tp_plan="auto") for path in folders.iterdir()}
    makes["control blocks"] = partial(without_rotating, folders / "blocks")
    if folders.name == "llama":
        makes |= {
            "by hand blocks": partial(by_hand, folders / "blocks", mesh, local=True),
            "by hand, DTensors blocks": partial(by_hand, folders / "blocks", mesh, local=False),
            "by hand whole": partial(by_hand, folders / "whole", mesh, local=True),
            "FSDP whole": partial(sharded, folders / "whole", mesh),
            "FSDP, then apply": partial(rotated_late, folders / "plain", mesh),
        }
    return dict(sorted(makes.items()))


@torch.no_grad()
def main(root: Path, result: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for family in sorted(path.name for path in root.iterdir()):
        folders = root / family
        original = load(folders / "plain")
        makes = makes_of(folders, mesh)
        found += [{"family": family} | cell(name, make, original) for name, make in makes.items()]
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
