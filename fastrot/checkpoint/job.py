"""All that a rotation of a checkpoint does, decided and checked before the first write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrot.api import plan as plan_model
from fastrot.checkpoint.device import CPU
from fastrot.checkpoint.drafts import Drafts, leftovers
from fastrot.checkpoint.fp8 import METHOD as FP8
from fastrot.checkpoint.fp8 import scales_of, without
from fastrot.checkpoint.header import (
    CheckpointError,
    Entry,
    Layout,
    Metadata,
    read_entry,
    read_headers,
    same_bytes,
)
from fastrot.checkpoint.mxfp4 import METHOD as MXFP4
from fastrot.checkpoint.mxfp4 import blocks_of
from fastrot.checkpoint.options import check_files
from fastrot.checkpoint.outputs import Job, files_of, sealed_job
from fastrot.checkpoint.source import indexed, outline, read_json, weight_files
from fastrot.checkpoint.tasks import Coded, Task, place_of, tasks_of
from fastrot.checkpoint.trace import Trace, stored_names, trace
from fastrot.checks import quant_method
from fastrot.edits import OnlineSite, Plan
from fastrot.errors import RotationError
from fastrot.fit import check
from fastrot.integrations.guard import lift
from fastrot.integrations.marks import GUARD
from fastrot.journal import Journal
from fastrot.norms import check_norms
from fastrot.online import OnlineRotation, attach, check_site, installed, make
from fastrot.recipe import Recipe
from fastrot.record import QUANT_METHOD, check_online, online_sites, sealed, with_application

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def prepare(
    source: Path,
    recipe: Recipe | Plan,
    *,
    dtype: torch.dtype | None = None,
    drafts: Drafts = "copy",
    shard: int | None = None,
    device: torch.device = CPU,
) -> Job:
    """Decide what becomes of a checkpoint; reads headers, norms and config.json.

    Args:
        source: the folder of a checkpoint of transformers, in safetensors.
        recipe: the rotations, or the plan that was made of them and of the configuration.
        dtype: of floating-point tensors; None leaves them as they are.
        drafts: ``copy`` keeps the tensors of multi-token prediction as they are, which is exact
            without R1, or with ``keep_head``; ``drop`` leaves them out.
        shard: bytes of a file of weights; None leaves the files as they are.
        device: where weights will be rotated; nothing is done there yet.

    Raises:
        RotationError: anything that can't be done, naming the tensor and the way out.
        TypeError: an argument of the wrong type.
        OSError: a file is missing or can't be read.
    """
    from fastrot.integrations.transformers import old_names

    check_files(dtype, drafts, shard)
    model = outline(source)
    entries, coded, metadata = numbers_of(source, model)
    earlier = _restored(model)
    made = trace(model, entries, old_names(earlier.values()))
    for name, rotation in earlier.items():
        if name in made.targets:
            rotation.operand = _read(name, made, entries)
    if earlier and earlier.keys() <= made.targets.keys():
        check_online(model)
    plan = check(model, recipe) if isinstance(recipe, Plan) else plan_model(model, recipe)
    known = {name: entry for name, entry in entries.items() if name not in made.unknown}
    kept = leftovers(model, plan, made, drafts)
    norms = _norms(model, plan, made, entries)
    tasks, equal = tasks_of(model, plan, made, known, dtype, coded)
    for name, other in equal.items():
        if not same_bytes(entries[name], entries[other]):
            raise CheckpointError(
                f"{name} and {other} differ, but config.json says that they are one "
                "(tie_word_embeddings): it is not clear which one is meant"
            )
    wanted = dtype or (torch.bfloat16 if coded else None)
    tasks += [_copied(entries[name], coded.get(name), wanted) for name in kept]
    config, constants = _recorded(source, model, plan, made, wanted)
    outputs = files_of(tasks, constants, entries, metadata, shard)
    return sealed_job(source, plan, outputs, norms, config, device)


def numbers_of(
    source: Path, model: "PreTrainedModel"
) -> tuple[dict[str, Entry], Mapping[str, Coded], dict[Path, Metadata]]:
    """The tensors of a checkpoint as its model has them, which becomes one of plain numbers.

    Returns:
        All tensors by their names, of a quantized weight its numbers; what makes these; and the
        metadata of the files.

    Raises:
        RotationError: it is quantized in a way that is not read, or damaged.
        OSError: a file is missing or can't be read.
    """
    entries, metadata = tensors_of(source)
    coded = _coded(source, model, entries)
    used = {entry.name for each in coded.values() for entry in (each.codes, each.factors)}
    entries = {name: entry for name, entry in entries.items() if name not in used}
    return entries | {name: each.numbers for name, each in coded.items()}, coded, metadata


def tensors_of(source: Path) -> tuple[dict[str, Entry], dict[Path, Metadata]]:
    """All tensors of a checkpoint in safetensors, and the metadata of its files.

    Raises:
        CheckpointError: a file is damaged, or a tensor that the index names is missing.
        OSError: a file is missing or can't be read.
    """
    files = weight_files(source)
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise FileNotFoundError(f"{source} has no weights in safetensors (model.safetensors)")
    index = f"{source}/model.safetensors.index.json"
    if away := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{index} names {away[0].relative_to(source)} ({len(away)} such files), which is not "
            "there: copy or download the files again"
        )
    entries, metadata = read_headers(files)
    lost = sorted(indexed(source) - entries.keys())
    if lost:
        raise CheckpointError(
            f"{index} names {lost[0]} ({len(lost)} such tensors), which no file holds: copy or "
            "download the files again, or take it out of the index"
        )
    return entries, metadata


def _coded(
    source: Path, model: "PreTrainedModel", entries: Mapping[str, Entry]
) -> Mapping[str, Coded]:
    """The weights of a quantized source; the model then is one of plain numbers."""
    method = quant_method(model.config)
    if method in (None, QUANT_METHOD):
        return {}
    settings = read_json(source / "config.json")
    inner = settings.get("text_config")
    inside = inner if isinstance(inner, dict) else {}
    given = settings.get("quantization_config") or inside.get("quantization_config") or {}
    if method not in (FP8, MXFP4):
        form = f", format={given['format']}" if "format" in given else ""
        raise RotationError(
            f"{source} is quantized (quant_method={method}{form}), and of quantized sources only "
            f"{FP8} in blocks and {MXFP4} are read; rotate the unquantized checkpoint, or load "
            "this one with transformers, which may dequantize it, and use fastrot.apply"
        )
    found = scales_of(entries, given) if method == FP8 else blocks_of(entries)
    decode(model)
    return found


def decode(model: "PreTrainedModel") -> None:
    """Make the outline of a model in fp8 or mxfp4 that of one of plain numbers."""
    if quant_method(model.config) in (FP8, MXFP4):
        for part in (model.config, model.config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config


def _restored(model: "PreTrainedModel") -> dict[str, OnlineRotation]:
    """Put the online rotations of an earlier rotation on the model, which then reads them."""
    sites = online_sites(model)
    for site in sites:
        check_site(model, site)
    _attach(model, sites)
    lift(model)
    return _operands(model)


def _attach(model: "PreTrainedModel", sites: Sequence[OnlineSite]) -> None:
    with Journal() as journal:
        attach(model, sites, make(model, sites, torch.device("cpu")), journal)


def _operands(model: "PreTrainedModel") -> dict[str, OnlineRotation]:
    """The online rotations by the names of their operands."""
    return {f"{name}.{r.name}.operand": r for name, _, r in installed(model)}


def _read(parameter: str, made: Trace, entries: Mapping[str, Entry]) -> Tensor:
    """A small parameter, put together from the files."""
    target = made.targets[parameter]
    first = entries[target.pieces[0].source]
    value = torch.empty(target.shape, dtype=first.dtype)
    for piece in target.pieces:
        found = read_entry(entries[piece.source])[place_of(piece, entries[piece.source])]
        value[tuple(slice(*ends) for ends in piece.box)] = found.view(piece.shape)
    return value


def _copied(entry: Entry, coded: Coded | None, dtype: torch.dtype | None) -> Task:
    """A tensor as it is, or the numbers of one whose codes mean nothing without their scales."""
    layout = entry if coded is None or dtype is None else Layout(entry.shape, dtype)
    return Task(entry.name, entry, layout, coded=coded)


def _norms(
    model: "PreTrainedModel", plan: Plan, made: Trace, entries: Mapping[str, Entry]
) -> dict[str, Tensor]:
    """The weights of all folded norms; each norm is checked to compute what its row says."""
    norms = {}
    for norm in plan.norms:
        if norm.kind == "scale":
            norms[norm.parameter] = _read(norm.parameter, made, entries)
            continue
        module = model.get_submodule(norm.name)
        for leaf in ("weight", "bias"):
            name = f"{norm.name}.{leaf}"
            if getattr(module, leaf, None) is not None:
                norms[name] = _read(name, made, entries)
                setattr(module, leaf, nn.Parameter(norms[name], requires_grad=False))
        check_norms([(norm, module)])
    return norms


def _recorded(
    source: Path, model: "PreTrainedModel", plan: Plan, made: Trace, dtype: torch.dtype | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The new config.json, and the operands that the checkpoint gets."""
    record = with_application(model.config, plan)
    before = _operands(model)
    _attach(model, plan.online)
    operands = {n: r.operand for n, r in _operands(model).items() if n not in before}
    names = stored_names(model, made, operands)
    config = without(read_json(source / "config.json"))
    inner = config.get("text_config")
    parts = [config, *([inner] if isinstance(inner, dict) else [])]
    if any(edit.source is not None for edit in plan.weights):
        for part in parts:
            part["tie_word_embeddings"] = False
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        for part in parts:
            part.pop("torch_dtype", None)
            part["dtype"] = name
    config["fastrot"] = sealed(record, model)
    if plan.online or before:
        config["quantization_config"] = {"quant_method": QUANT_METHOD}
        config[GUARD] = QUANT_METHOD
    return config, {names[name]: operand for name, operand in operands.items()}
