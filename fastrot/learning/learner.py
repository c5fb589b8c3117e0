"""``fastrot.learn``."""

import copy
import gc
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastrot.api import apply
from fastrot.checks import check_flag, check_model
from fastrot.edits import Plan
from fastrot.errors import RotationError
from fastrot.lab.evaluate import Losses, check_causal, compare, evaluate
from fastrot.lab.quantized import quantized
from fastrot.lab.schemes import Scheme
from fastrot.learning.balance import check_permutable, orders_of
from fastrot.learning.descents import fitted, refined
from fastrot.learning.kept import Kept, run_of
from fastrot.learning.learned import Learned
from fastrot.learning.orthogonal import defect
from fastrot.learning.terms import SITES, bases, check_one_order
from fastrot.learning.windows import check_judges, parted, windows_in
from fastrot.recipe import Recipe, takes_recipe
from fastrot.verification import learned_positions, vocabulary

REFINED = 60
"""Steps of the second descent where weights are rounded to nearest: there it gains most."""


@takes_recipe
@torch.inference_mode(False)
def learn(
    model: Any,
    batches: Tensor | Mapping[str, Tensor] | Iterable[Any],
    rotations: str | Sequence[str] | Recipe = ("R1", "R2", "R3", "R4"),
    *,
    scheme: str | Scheme = "w4a4kv4",
    heldout: Tensor | Mapping[str, Tensor] | Iterable[Any] | None = None,
    steps: int = 300,
    refine: int | None = None,
    permute: bool = False,
    vectors: int = 4096,
    keep: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Learned:
    """Learn R1, R2 and R3 for a model and a scheme, beginning with those of a recipe.

    What each rotation turns is captured once, with how much the loss minds noise there; then an
    orthogonal matrix is fitted to it, without running the model. The learned matrices are taken if
    the quantized model loses less with them than with the recipe, by more than two standard errors
    of the paired difference, on windows that are held out for that: on such text they are not worse
    than the recipe, beyond chance. What comes out is compared with no rotation at all, too, since
    some schemes (nvfp4) are better off without: ``print(learned)`` says so.

    Args:
        model: as for :func:`fastrot.apply`, not rotated; it is left as it is. Beside it memory for
            copies of it in float32 is needed: one and a half, two and a half where weights are
            rounded, three with ``permute``, five with ``refine``; and for what is kept of the text.
        batches: token ids to learn from: ``(n, length)``, what a tokenizer makes (a dict with
            ``input_ids``), or an iterable of these, all of one length; without padding.
        rotations: the rotations, or a whole recipe; R4 stays as it is there, since a learned one
            would be a dense matrix at run time.
        scheme: what will be quantized, see :meth:`fastrot.lab.schemes.Scheme.parse`.
        heldout: as ``batches``, eight windows or more, none of them in ``batches``: text that
            decides, best of another kind. Default: a quarter of ``batches``, eight windows or more,
            from which nothing is learned then.
        steps: of descent for R1; R2 and R3 take a fifth of it.
        refine: steps of a second descent, of all together, on the loss of the quantized model
            itself (SpinQuant's way); each runs the model forwards and backwards on one window, and
            needs memory for that. Its matrices are taken if they are better than the first, by the
            same measure. Default: 60 if the scheme rounds weights to nearest, else none.
        permute: first let channels change places before R4's blocks, so that each block holds as
            much as any other (PeRQ); taken, as matrices are, if it is better. R4 must have blocks:
            ``block_size={"R4": 32}``.
        vectors: kept of each site, in float32; with fewer, what is learned is of this text alone
            (of SmolLM2, 1024 gained nothing on another kind of text, 4096 as much as on this one).
        keep: a file in which what is found is kept as soon as it is; the same call goes on from
            there after it was stopped, with the same result. It is yours to remove.
        progress: show a bar.
        options: see :class:`fastrot.Recipe`.

    Raises:
        RotationError: the model predicts no tokens, nothing in the recipe can be learned for this
            scheme, matrices are given already, orders differ between layers, the text is too short
            or longer than a table of positions, has padding, ids beyond the vocabulary or a
            held-out window twice, or the file in ``keep`` is of another run.
        TypeError: an argument of the wrong type.
        OSError: that file can't be written.
    """
    check_model(model)
    check_flag("progress", progress)
    check_flag("permute", permute)
    recipe = Recipe.of(rotations, options)
    if not isinstance(scheme, (str, Scheme)):
        raise TypeError(f"scheme must be a name such as 'w4a4kv4', or a Scheme, got {scheme!r}")
    scheme = Scheme.parse(scheme)
    if refine is None:
        refine = REFINED if scheme.weights and not scheme.weights.gptq else 0
    _check_counts(steps, refine, vectors, permute)
    wanted = _learnable(recipe, scheme, permute) if steps or refine else ()
    check_causal(model)
    reads = vocabulary(model), learned_positions(model)
    windows = windows_in(batches, *reads, "batches")
    if heldout is None:
        windows, judges = parted(windows)
    else:
        judges = windows_in(heldout, *reads, "heldout")
    check_judges(windows, judges)
    wishes = {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
    if permute:
        check_permutable(model, recipe)
    decides = recipe, str(scheme), steps, refine, permute, vectors, windows, judges
    kept = Kept(None, "") if keep is None else Kept(Path(keep), run_of(model, *decides))
    found: dict[str, list[Tensor]] = {}
    history: list[float] = []
    taken: list[str] = []
    rotated, plan = _rotated(model, wishes)
    check_one_order({name: each for name, each in bases(plan, rotated).items() if name in wanted})
    with tqdm(disable=not progress) as bar:
        before = best = after = _quantized_losses(rotated, scheme, judges, windows)
        if permute:
            permuted = {**wishes, "permutations": {"R4": orders_of(rotated, plan, windows)}}
            candidate, made = _rotated(model, permuted)
            after = _quantized_losses(candidate, scheme, judges, windows)
            if _better(after, best):
                wishes, best, rotated, plan = permuted, after, candidate, made
                taken.append("permutations")
            del candidate
        if wanted:
            found, history = fitted(
                rotated, plan, wanted, scheme, windows, steps, vectors, bar, kept
            )
            del rotated
            learned, plan = _rotated(model, {**wishes, "matrices": found})
            after = _quantized_losses(learned, scheme, judges, windows)
            if refine:
                bar.reset(refine)
                bar.set_description("refine")
                other, losses = refined(learned, plan, found, scheme, windows, refine, bar, kept)
                del learned
                learned, _ = _rotated(model, {**wishes, "matrices": other})
                then = _quantized_losses(learned, scheme, judges, windows)
                history += losses
                if _better(then, after):
                    found, after = other, then
            if _better(after, best):
                wishes, best = {**wishes, "matrices": found}, after
                taken.append("matrices")
            del learned
    unrotated = _quantized_losses(_copied(model), scheme, judges, windows)
    return Learned(
        **wishes,
        taken=tuple(taken),
        scheme=str(scheme),
        steps=steps,
        text=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        before=before.mean,
        gain=compare(best if taken else after, before),
        unrotated=compare(best, unrotated),
        defect=max((defect(matrix) for each in found.values() for matrix in each), default=0.0),
        history=tuple(history),
    )


def _rotated(model: Any, wishes: dict[str, Any]) -> tuple[Any, Plan]:
    """A copy of a model in float32 that is rotated by a recipe, and the plan of that."""
    copied = _copied(model)
    return copied, apply(copied, Recipe(**wishes)).plan


def _copied(model: Any) -> Any:
    gc.collect()  # an earlier copy, whose modules and hooks refer to each other
    return copy.deepcopy(model).float().eval()


def _better(losses: Losses, others: Losses) -> bool:
    """Whether they are less by more than two standard errors, or finite where others are not."""
    gain = compare(losses, others)
    finite = math.isfinite(losses.mean) and not math.isfinite(others.mean)
    return (gain.is_clear and gain.mean < 0) or finite


def _quantized_losses(model: Any, scheme: Scheme, judges: Tensor, windows: Tensor) -> Losses:
    with quantized(model, scheme, windows):
        return evaluate(model, judges)


def _check_counts(steps: int, refine: int, vectors: int, permute: bool) -> None:
    for name, value, least in (("steps", steps, 0), ("refine", refine, 0), ("vectors", vectors, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RotationError(f"{name}={value!r} is no whole number from {least} on")
    if not (steps or refine or permute):
        raise RotationError("steps=0 and refine=0 learn nothing; give one of them")


def _learnable(recipe: Recipe, scheme: Scheme, permute: bool) -> tuple[str, ...]:
    if recipe.matrices:
        raise RotationError("the recipe has matrices already; leave matrices out to learn them")
    if recipe.transform_config is not None:
        raise RotationError("rotations of a transform_config are not learned; name R1, R2 or R3")
    wanted = []
    for name in recipe.rotations:
        kinds = {scheme.at(site) for site in SITES.get(name, ())}
        if name != "R3" and name in SITES:
            kinds.add(scheme.weights)
        if kinds - {None}:
            wanted.append(name)
    if not wanted and not permute:
        raise RotationError(
            f"of {', '.join(recipe.rotations)} none can be learned for {scheme}; R1 and R2 can for "
            "weights and activations, R2 and R3 for keys and values"
        )
    return tuple(wanted)
