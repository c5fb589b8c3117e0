"""``fastrot.plan`` and ``fastrot.apply``: the whole way from arguments to a rotated model."""

import warnings
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
from fastrot.heads import check_heads, head_dim_of, key_dim_of
from fastrot.index import Index, find_holders
from fastrot.integrations.transformers import clear_stale_mark, mark
from fastrot.journal import Journal, Undo, exclusive
from fastrot.mapping import (
    Architecture,
    Mapping,
    NormMapping,
    Patterns,
    as_mapping,
    as_norm_mapping,
    find_architecture,
    with_head,
)
from fastrot.online import attach, check_site, make
from fastrot.patterns import NoMatchError, matches
from fastrot.record import applied_groups, own_config, retrace, sealed, with_application
from fastrot.resolve import on_meta, resolve
from fastrot.sites import find_sites
from fastrot.transform_config import (
    ROTATIONS,
    parse_precision,
    parse_transform_config,
    spinquant_config,
)
from fastrot.values import PrecisionWarning, check_values, notes

CLASSIFIER = "score"
"""What transformers' classifiers have in the place of a causal model's head."""


class UnsupportedRotationError(RotationError):
    """A rotation that this architecture does not allow."""


def plan(
    model: PreTrainedModel,
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
    norms = _parse_norms(norm_mappings)
    if transform_config is not None:
        config = parse_transform_config(transform_config)
        mapping = None
        if norms is None:
            norms = _known_norms(model)
    else:
        wanted = _parse_rotations(rotations)
        mapping, norms = _roles(model, mappings, norms, wanted)
        _check_roles(model, mapping, wanted)
        check_flag("randomize", randomize)
        config = spinquant_config(
            mapping,
            norms,
            wanted,
            transform_type=transform_type,
            randomize=randomize,
            block_sizes=_block_sizes(model, mapping, wanted, block_size),
            precision=parse_precision(torch.float32 if precision is None else precision),
        )
    twice = [name for name in config.config_groups if name in applied_groups(model.config)]
    if twice:
        raise AlreadyRotatedError(
            f"{' and '.join(twice)} is already on this {type(model).__name__}; a second time "
            "would undo or scramble it; start from the original weights"
        )
    dtype = parse_precision(torch.float64 if precision is None else precision)
    result = resolve(model, config, norms, _parse_seed(seed), mapping, dtype)
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
    return result if on_meta(model) else replace(result, notes=notes(model, result))


@torch.inference_mode(False)
def apply(
    model: PreTrainedModel,
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
            rotated. With ``mappings`` classes are yours to describe; hooks are asked for still.
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
    check_whole(model)
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


def _execute(model: PreTrainedModel, made: Plan, undo: Undo, progress: bool) -> None:
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


def _parse_rotations(rotations: str | Sequence[str]) -> tuple[str, ...]:
    names = (rotations,) if isinstance(rotations, str) else rotations
    if not isinstance(names, Iterable):
        raise TypeError(f"rotations must be a list of names such as 'R1', got {rotations!r}")
    wanted: list[str] = []
    for name in names:
        upper = name.upper() if isinstance(name, str) else name
        if upper not in ROTATIONS:
            near = get_close_matches(str(name).upper(), ROTATIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RotationError(f"rotation {name!r} is not one of {', '.join(ROTATIONS)}{hint}")
        if upper in wanted:
            raise RotationError(f"rotation {upper} is named twice in {names}")
        wanted.append(upper)
    if not wanted:
        raise RotationError(f"rotations is empty; name some of {', '.join(ROTATIONS)}")
    return tuple(name for name in ROTATIONS if name in wanted)


def _parse_seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {seed!r}")
    return seed


def _roles(
    model: PreTrainedModel,
    mappings: Mapping | MappingABC[str, Any] | None,
    norms: tuple[NormMapping, ...] | None,
    wanted: Sequence[str],
) -> tuple[Mapping, tuple[NormMapping, ...]]:
    if mappings is not None:
        return as_mapping(mappings), _known_norms(model) if norms is None else norms
    row = find_architecture(model.config)
    for name in wanted:
        if name in row.refuses:
            rest = [other for other in wanted if other not in row.refuses]
            way = f"; leave it out, rotations={tuple(rest)!r} works" if rest else ""
            raise UnsupportedRotationError(
                f"{name} of {type(model).__name__}: {row.refuses[name]}{way}"
            )
    row = _present(model, row)
    return row.mapping, row.norms if norms is None else norms


def _present(model: PreTrainedModel, row: Architecture) -> Architecture:
    """A row of the table with the head of this model, without what it does not have."""
    index = Index(model)
    headless = not find_holders(index, row.mapping.lm_head, missing_ok=True)
    if headless and isinstance(getattr(model, CLASSIFIER, None), nn.Linear):
        row = with_head(row, CLASSIFIER)
    mapping = row.mapping

    def kept(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(p for p in patterns if find_holders(index, (p,), missing_ok=True))

    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    roles: dict[str, Any] = {
        field.name: kept(getattr(mapping, field.name))
        for field in fields(mapping)
        if field.type == Patterns
    }
    ignore = tuple(u for u in mapping.ignore if any(matches(name, u.pattern) for name in names))
    norms = tuple(
        replace(norm, linears=kept(norm.linears))
        for norm in row.norms
        if kept(norm.linears) and (norm.norm is None or kept((norm.norm,)))
    )
    return replace(row, mapping=replace(mapping, **roles, ignore=ignore), norms=norms)


def _parse_norms(value: Sequence[Any] | None) -> tuple[NormMapping, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, MappingABC)) or not isinstance(value, Iterable):
        raise TypeError(f"norm_mappings must be a list of NormMapping, got {value!r}")
    return tuple(map(as_norm_mapping, value))


def _check_roles(model: PreTrainedModel, mapping: Mapping, wanted: Sequence[str]) -> None:
    """What only makes sense for R1 to R4: places to act, a head, value heads that fit together."""
    places = {
        "R1": ("embedding", mapping.embedding),
        "R2": ("attn_o", mapping.attn_o),
        "R3": ("attn", mapping.attn),
        "R4": ("mlp_out", mapping.mlp_out),
    }
    for name in wanted:
        role, patterns = places[name]
        if not patterns:
            raise UnsupportedRotationError(
                f"{name} has no place in {type(model).__name__}: no module has the role {role}"
            )
    if "R1" in wanted and not find_sites(model, mapping.lm_head, missing_ok=True):
        whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type, "the causal model")
        raise NoMatchError(
            f"R1 rotates the residual stream from the embedding to the head, but no module of "
            f"{type(model).__name__} has the role lm_head; pass {whole}, or name its head in "
            "mappings= and norm_mappings="
        )
    if "R3" in wanted and mapping.attn_v_rows == "latent":
        raise UnsupportedRotationError(
            f"R3: {type(model).__name__} caches latents, not keys; leave it out"
        )
    if "R2" in wanted:
        check_heads(model, mapping, head_dim_of(model, mapping))


def _known_norms(model: PreTrainedModel) -> tuple[NormMapping, ...]:
    try:
        return _present(model, find_architecture(model.config)).norms
    except ValueError:
        return ()


def _block_sizes(
    model: PreTrainedModel,
    mapping: Mapping,
    wanted: Sequence[str],
    block_size: int | MappingABC[str, int] | None,
) -> dict[str, int | None]:
    sizes: dict[str, int | None] = dict.fromkeys(ROTATIONS)
    if "R2" in wanted:
        sizes["R2"] = head_dim_of(model, mapping)
    if "R3" in wanted:
        sizes["R3"] = key_dim_of(model, mapping)
    if isinstance(block_size, MappingABC):
        given = {str(name).upper(): size for name, size in block_size.items()}
        if len(given) < len(block_size):
            raise RotationError(f"block_size names a rotation twice: {', '.join(block_size)}")
    else:
        given = {name: block_size for name in ("R1", "R4") if block_size is not None}
        if given and not set(given).intersection(wanted):
            raise RotationError(
                f"block_size={block_size} is that of R1 and R4, which are not among "
                f"{', '.join(wanted)}; give R2 or R3 their own with a dict"
            )
        given = {name: size for name, size in given.items() if name in wanted}
    for name, size in given.items():
        if name not in wanted:
            known = ROTATIONS if name not in ROTATIONS else wanted
            raise RotationError(f"block_size names {name!r}, not one of {', '.join(known)}")
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"block_size of {name} must be an int, got {size!r}")
        if size < 1:
            raise RotationError(f"block_size of {name} must be positive, got {size}")
        head_dim = sizes[name]
        if head_dim is not None and head_dim % size:
            raise RotationError(f"block_size={size} of {name} does not divide head_dim {head_dim}")
        sizes[name] = size
    return sizes


def _forget_ties(model: PreTrainedModel, config: Any, journal: Journal) -> None:
    config.tie_word_embeddings = False
    text = config.get_text_config()
    text.tie_word_embeddings = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.all_tied_weights_keys:
            keys = module.get_expanded_tied_weights_keys(all_submodels=True)
            journal.set(module, "all_tied_weights_keys", keys)
