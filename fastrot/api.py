"""``fastrot.plan`` and ``fastrot.apply``: the whole way from arguments to a rotated model."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrot.checks import check_flag, check_model
from fastrot.damage import mark_damaged
from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.fit import check_first_time, checked, fitted
from fastrot.foreign import check_whole
from fastrot.fuse import Fusion
from fastrot.handle import Handle
from fastrot.index import Index
from fastrot.integrations.guard import check_complete
from fastrot.integrations.marks import clear_stale_mark, mark
from fastrot.integrations.outlines import model_of
from fastrot.journal import Journal, Undo, exclusive
from fastrot.memory import on_cpu
from fastrot.online import attach, make
from fastrot.recipe import Recipe, takes_recipe
from fastrot.record import own_config, retrace, sealed, with_application
from fastrot.resolve import on_meta, resolve
from fastrot.spinquant import configured
from fastrot.values import PrecisionWarning, check_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@takes_recipe
def plan(
    model: "PreTrainedModel | PreTrainedConfig",
    rotations: str | Sequence[str] | Recipe = ("R1", "R2"),
    *,
    trust: bool = False,
    **options: Any,
) -> Plan:
    """What :func:`apply` would do, without touching the model.

    Args:
        model: as for :func:`apply`; or one on the meta device, without any weights; or the
            configuration of a causal language model. Shapes alone decide then.
        rotations: the rotations, or a whole recipe.
        trust: as for :func:`apply`.
        options: see :class:`fastrot.Recipe`.

    Raises:
        RotationError: the model, a size or an option does not allow it.
        TypeError: an argument of the wrong type, or options beside a recipe.
    """
    config_alone = not isinstance(model, nn.Module) and hasattr(model, "model_type")
    described: Any = model_of(model) if config_alone else model  # type: ignore[arg-type]
    check_model(described)
    if not config_alone:
        check_complete(described)
    return _planned(Index(described), Recipe.of(rotations, options), trust)


def _planned(index: Index, recipe: Recipe, trust: bool) -> Plan:
    check_flag("trust", trust)
    config, mapping, norms, given = configured(index, recipe)
    check_first_time(index, config)
    dtype = recipe.precision or torch.float64
    made = resolve(index, config, norms, recipe.seed, mapping, dtype, recipe.by_table, given)
    return fitted(index, made, trust)


@takes_recipe
@torch.inference_mode(False)
def apply(
    model: "PreTrainedModel",
    rotations: str | Sequence[str] | Recipe | Plan = ("R1", "R2"),
    *,
    trust: bool = False,
    undo: Undo = "none",
    progress: bool = False,
    **options: Any,
) -> Handle:
    """Rotate a language model in place, without changing the function it computes.

    Args:
        model: a transformers causal language model in float64, float32, bfloat16 or float16, its
            weights in memory.
        rotations: the rotations; or a whole recipe; or a plan that :func:`plan` made, for this
            model or for one with the same names and shapes.
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
        options: see :class:`fastrot.Recipe`.

    Returns:
        A handle: what was done (prints as a table), the transform configuration, ``remove()``.

    Raises:
        RotationError: the model, a size or an argument does not allow it. The model is untouched,
            bit for bit, after this or any other exception but the next two.
        HalfRotatedError: an error after the first write, without copies.
        KeyboardInterrupt: the model is untouched, or wholly rotated; ``model.config.fastrot``
            tells.
        TypeError: an argument of the wrong type, or options beside a recipe or a plan.
        OSError, MemoryError: no room for the copies, or for the largest weight in ``precision``.
    """
    check_model(model)
    check_flag("progress", progress)
    check_whole(model, trust=trust)
    with exclusive(model), on_cpu():
        if isinstance(rotations, Plan) and options:
            raise TypeError(f"{', '.join(options)} beside a Plan, which has decided it; plan anew")
        check_complete(model)
        index = Index(model)
        if isinstance(rotations, Plan):
            made = checked(index, rotations, trust)
        else:
            made = _planned(index, Recipe.of(rotations, options), trust)
        if on_meta(model):
            raise RotationError(
                f"the weights of {type(model).__name__} are on the meta device (not loaded, or "
                "offloaded); load the whole model into memory before rotating it"
            )
        check_values(index, made)
        for note in made.notes:
            warnings.warn(note, PrecisionWarning, stacklevel=3)
        _execute(index, made, undo, progress)
    return Handle(model, made)


def _execute(index: Index, made: Plan, undo: Undo, progress: bool) -> None:
    model: Any = index.model
    fusion = Fusion(index, made)
    modules = make(model, made.online)
    record = with_application(model.config, made)
    with Journal(
        fusion.overwritten, undo, lambda: mark_damaged(model, fusion.parameters)
    ) as journal:
        config = own_config(model, journal)
        clear_stale_mark(model, config, journal)
        attach(model, made.online, modules, journal)
        if any(edit.source for edit in made.weights):
            _forget_ties(model, config, journal)
        config.fastrot = sealed(record, model)
        if made.online:
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
