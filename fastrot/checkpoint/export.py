"""``fastrot.export``: a rotated checkpoint as a server takes it that knows nothing of fastrot."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastrot.checkpoint.header import CheckpointError
from fastrot.checkpoint.job import tensors_of
from fastrot.checkpoint.outputs import Job, files_of, sealed_job
from fastrot.checkpoint.rotate import occupied, write
from fastrot.checkpoint.source import configuration, read_json
from fastrot.checkpoint.tasks import Task
from fastrot.checkpoint.workers import Worker
from fastrot.checks import quant_method
from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.integrations.vllm.operands import OPERAND, with_matrices
from fastrot.integrations.vllm.recorded import DELEGATED, recorded_model
from fastrot.integrations.vllm.stock import StockScheme, stock_schemes, transform_config
from fastrot.record import QUANT_METHOD, applications, has_online, online_sites

Server = Literal["vllm"]

DENSE: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
}
"""Of a checkpoint in which nothing is quantized."""


def export(
    source: str | Path,
    target: str | Path,
    to: Server = "vllm",
    *,
    fresh: bool = False,
    progress: bool = False,
) -> tuple[StockScheme, ...]:
    """Write a copy of a rotated checkpoint with R4 online that a server alone computes right.

    vLLM on CUDA, without tensor parallelism, multiplies the inputs of the down projections itself,
    as the ``transform_config`` asks that the copy has in config.json. Weights are copied bit for
    bit, without loading the model; the source is only read, and the target appears when it is
    whole, or never. The record of the rotations stays, so that transformers with fastrot refuses
    the copy, instead of leaving R4 out.

    Args:
        source: a checkpoint with R4 online; all else that is rotated, such as R1 and R2, is fused.
            It may have been quantized in the format of compressed-tensors since.
        target: a new or an empty folder.
        to: the server.
        fresh: throw away what an earlier call for this target left unfinished.
        progress: show a bar.

    Returns:
        What the server multiplies by, and where.

    Raises:
        RotationError: the server can't compute it, or needs no export; a file is damaged.
        OSError: a file can't be read or written, or there is no room.
    """
    if to not in get_args(Server):
        raise RotationError(f"to={to!r} is not one of {', '.join(get_args(Server))}")
    source, target = Path(source).resolve(), Path(target).resolve()
    taken = occupied(source, target)
    job, schemes = _prepare(source)
    write(job, target, taken, worker=Worker(0, 1), fresh=fresh, progress=progress)
    return schemes


@torch.no_grad()
def _prepare(source: Path) -> tuple[Job, tuple[StockScheme, ...]]:
    """Decide all that is written; reads config.json, headers and matrices."""
    config, settings = configuration(source), read_json(source / "config.json")
    described = _described(source, config, settings.get("quantization_config"))
    entries, metadata = tensors_of(source)
    model = recorded_model(config)
    schemes = stock_schemes(model, with_matrices(online_sites(model), str(source)))
    for site in (site for scheme in schemes for site in scheme.sites):
        if not any(name.startswith(f"{site.module}.") for name in entries):
            raise CheckpointError(
                f"the checkpoint has no tensor of {site.module}, whose input is rotated: it is "
                "incomplete, or gives its layers other names than transformers does; load it, and "
                "save it with save_pretrained"
            )
    transforms = transform_config(schemes)
    settings["quantization_config"] = described | {"transform_config": transforms.to_dict()}
    dtype = config.get_text_config().dtype or torch.float32
    matrices = {name: m for scheme in schemes for name, m in scheme.tensors(dtype).items()}
    tasks = [Task(name, e, e) for name, e in entries.items() if not OPERAND.search(name)]
    plan = Plan(
        model_class=type(model).__name__,
        weights=(),
        norms=(),
        online=tuple(site for scheme in schemes for site in scheme.sites),
        transform_config=transforms,
        seed=applications(config)[-1][0],
        shapes={},
        outline="",
    )
    files = files_of(tasks, matrices, entries, metadata, None)
    return sealed_job(source, plan, files, {}, settings), schemes


def _described(source: Path, config: Any, quantization: Any) -> dict[str, Any]:
    """The ``quantization_config`` without transforms; refuses what needs or allows no export."""
    if not applications(config):
        raise RotationError(
            f"{source} was not rotated by fastrot (config.json has no record), and can be served "
            "as it is; fastrot rotate --rotations R1 R2 R4 makes a checkpoint to export"
        )
    if not has_online(config):
        raise RotationError(
            f"{source} has no online rotation: all are fused into the weights, and vLLM serves it "
            "as it is"
        )
    method = quant_method(config)
    if method == QUANT_METHOD:
        return dict(DENSE)
    if method not in DELEGATED or not isinstance(quantization, dict):
        raise RotationError(
            f"{source} has online rotations, and the quant_method {method} in config.json; export "
            f"the checkpoint as fastrot wrote it, or quantized with {', '.join(DELEGATED)}"
        )
    if quantization.get("transform_config"):
        raise RotationError(
            f"{source} has a transform_config already: it was exported before, or another tool "
            "transformed it, too; export the checkpoint as it was before that"
        )
    return quantization
