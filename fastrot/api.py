"""``fastrot.plan`` and ``fastrot.apply``: the whole way from arguments to a rotated model."""

import warnings
from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastrot.arguments import block_sizes, parse_norms, parse_rotations, parse_seed
from fastrot.checks import (
    AlreadyRotatedError,
    check_flag,
    check_loaded,
    check_model,
)
from fastrot.damage import mark_damaged
from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.foreign import check_foreign, check_whole
from fastrot.fuse import Fusion
from fastrot.handle import Handle
from fastrot.integrations.marks import clear_stale_mark, mark
from fastrot.journal import Journal, Undo, exclusive
from fastrot.mapping import Mapping, NormMapping
from fastrot.online import attach, check_site, make
from fastrot.record import applied_groups, own_config, retrace, sealed, with_application
from fastrot.resolve import on_meta, resolve
from fastrot.rows import check_roles, known_norms, roles_of
from fastrot.transform_config import (
    parse_precision,
    parse_transform_config,
    spinquant_config,
)
from fastrot.values import PrecisionWarning, check_values, notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(
    model: "PreTrainedModel",
    rotations: str | Sequence[str] = ("R1", "R2"),
    *,
    transform_type: str = "hadamard",
    randomize: bool = False,
    block_size: int | MappingABC[str, int] | None = None,
    seed: int = 0,
    precision: torch.dtype | str | None = None,
    mappings: Mapping | MappingABC[str, Any] | None = None,
    norm_mappings: Sequence[NormMapping | MappingABC[str, Any]] | None = None,
    transform_config: Any = None,
    trust: bool = False,
) -> Plan:
    """What :func:`apply` would do, without touching the model. Arguments as there.

    The model may also lie on the meta device, without any weights: then shapes alone decide.
    """
    check_model(model)
    norms = parse_norms(norm_mappings)
    if transform_config is not None:
        config = parse_transform_config(transform_config)
        mapping = None
        if norms is None:
            norms = known_norms(model)
    else:
        wanted = parse_rotations(rotations)
        mapping, norms = roles_of(model, mappings, norms, wanted)
        check_roles(model, mapping, wanted)
        check_flag("randomize", randomize)
        config = spinquant_config(
            mapping,
            norms,
            wanted,
            transform_type=transform_type,
            randomize=randomize,
            block_sizes=block_sizes(model, mapping, wanted, block_size),
            precision=parse_precision(torch.float32 if precision is None else precision),
        )
    twice = [name for name in config.config_groups if name in applied_groups(model.config)]
    if twice:
        raise AlreadyRotatedError(
            f"{' and '.join(twice)} is already on this {type(model).__name__}; a second time "
            "would undo or scramble it; start from the original weights"
        )
    dtype = parse_precision(torch.float64 if precision is None else precision)
    result = resolve(model, config, norms, parse_seed(seed), mapping, dtype)
    if result.sites and getattr(model, "use_kernels", False):
        raise RotationError(
            "the model uses kernels from the hub, which replace whole modules and pass by the "
            "rotations inside; call model.set_use_kernels(False) first"
        )
    loaded = not on_meta(model)
    for site in result.sites:
        module = model.get_submodule(site.module)
        if loaded:
            check_loaded(site.module, module)
        check_site(site, module)
    if not result.edits and not result.sites:
        raise RotationError(
            f"transform_config describes no transform: {', '.join(config.config_groups)} names no "
            "place in 'apply'"
        )
    check_flag("trust", trust)
    if not trust:
        check_foreign(model, result, classes=mappings is None and transform_config is None)
    return replace(result, notes=notes(model, result)) if loaded else result


@torch.inference_mode(False)
def apply(
    model: "PreTrainedModel",
    rotations: str | Sequence[str] = ("R1", "R2"),
    *,
    transform_type: str = "hadamard",
    randomize: bool = False,
    block_size: int | MappingABC[str, int] | None = None,
    seed: int = 0,
    precision: torch.dtype | str | None = None,
    mappings: Mapping | MappingABC[str, Any] | None = None,
    norm_mappings: Sequence[NormMapping | MappingABC[str, Any]] | None = None,
    transform_config: Any = None,
    trust: bool = False,
    undo: Undo = "none",
    progress: bool = False,
) -> Handle:
    """Rotate a language model in place, without changing the function it computes.

    Args:
        model: a transformers causal language model in float64, float32, bfloat16 or float16, its
            weights in memory.
        rotations: some of R1 (residual stream, fused), R2 (value heads, fused), R3 (queries and
            keys after RoPE, online) and R4 (input of the down projection, online and fused), in
            any letter case.
        transform_type: ``hadamard``, ``random-hadamard`` (seeded signs) or ``random-matrix``
            (uniformly random orthogonal; any size, dense and slow online).
        randomize: a rotation of its own for every layer in R2, R3 and R4 (``hadamard`` then draws
            signs, as one fixed matrix can't differ).
        block_size: block-diagonal rotations with blocks of this size for R1 and R4; R2 and R3
            always span one head. A dict gives each rotation its own, ``{"R4": 256}``.
        seed: of everything random.
        precision: dtype of the arithmetic, float64 or float32; online it is at least that of the
            activations. Default: float64 on weights, float32 on activations.
        mappings: the roles of a model that fastrot's table does not list.
        norm_mappings: its norms and their readers.
        transform_config: compressed-tensors' ``TransformConfig`` (object or dict); replaces
            ``rotations``, ``transform_type``, ``randomize``, ``block_size`` and ``mappings``. It
            may describe any transform on any linear module, so it is its author who answers for
            exactness. Its ``precision`` is that of online arithmetic.
        trust: let pass forwards and hooks of others on the modules that are rotated, and classes
            that transformers does not have: you know that they neither read nor write what is
            rotated; and other models that share a part with this one. With ``mappings`` classes are
            yours to describe; hooks are asked for still.
        undo: copies of the weights, for an error that nobody foresaw. Everything that can fail
            happens before the first write, and Ctrl-C and SIGTERM wait until the last (a pass
            over the weights, seconds for most models), so the default, ``none``, keeps no copy:
            an error in between, such as a failing memory bank, leaves a model that refuses to run
            and to be saved as a rotated one. ``memory`` (as much again as the rotated weights) and
            ``disk`` (a temporary file) take the weights back, bit for bit.
        progress: show a progress bar.

    Returns:
        A handle: what was done (prints as a table), the transform configuration, ``remove()``.

    Raises:
        RotationError: the model, a size or an argument does not allow it. The model is untouched,
            bit for bit, after this or any other exception but the next two.
        HalfRotatedError: an error after the first write, without copies.
        KeyboardInterrupt: the model is untouched, or wholly rotated; ``model.config.fastrot``
            tells.
        TypeError: an argument of the wrong type.
        OSError, MemoryError: no room for the copies, or for the largest weight in ``precision``.
    """
    check_model(model)
    check_flag("progress", progress)
    check_whole(model, trust=trust)
    with exclusive(model), torch.device("cpu"):
        made = plan(
            model,
            rotations,
            transform_type=transform_type,
            randomize=randomize,
            block_size=block_size,
            seed=seed,
            precision=precision,
            mappings=mappings,
            norm_mappings=norm_mappings,
            transform_config=transform_config,
            trust=trust,
        )
        if on_meta(model):
            raise RotationError(
                f"the weights of {type(model).__name__} are on the meta device (not loaded, or "
                "offloaded); load the whole model into memory before rotating it"
            )
        check_values(model, made)
        for note in made.notes:
            warnings.warn(note, PrecisionWarning, stacklevel=3)
        _execute(model, made, undo, progress)
    return Handle(model, made)


def _execute(model: "PreTrainedModel", made: Plan, undo: Undo, progress: bool) -> None:
    fusion = Fusion(model, made)
    modules = make(model, made.sites)
    record = with_application(model.config, made)
    with Journal(
        fusion.overwritten, undo, lambda: mark_damaged(model, fusion.parameters)
    ) as journal:
        config = own_config(model, journal)
        clear_stale_mark(model, config, journal)
        attach(model, made.sites, modules, journal)
        if any(edit.source for edit in made.edits):
            _forget_ties(model, config, journal)
        config.fastrot = sealed(record, model)
        if made.sites:
            mark(config)
        retrace()
        fusion.run(journal, progress)


def _forget_ties(model: "PreTrainedModel", config: Any, journal: Journal) -> None:
    from transformers import PreTrainedModel

    config.tie_word_embeddings = False
    text = config.get_text_config()
    text.tie_word_embeddings = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.all_tied_weights_keys:
            keys = module.get_expanded_tied_weights_keys(all_submodels=True)
            journal.set(module, "all_tied_weights_keys", keys)
