"""R1 to R4 (Liu et al., "SpinQuant", arXiv 2405.16406, figure 1): all that they differ in.

:data:`SPINQUANT` has a row for each; :func:`configured` makes a transform configuration of a recipe
that names some of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from fastrot.ends import between_ends
from fastrot.errors import RotationError
from fastrot.heads import (
    check_heads,
    check_latents,
    differ,
    head_dim_of,
    key_dim_of,
    without_values,
)
from fastrot.index import Index, find_holders
from fastrot.mapping import PLACES, ROTATIONS, STREAM, Mapping, NormMapping
from fastrot.middle import middle_places
from fastrot.patterns import NoMatchError
from fastrot.recipe import Recipe
from fastrot.rotations import MATRIX, PERMUTATION, Rotation
from fastrot.rows import UnsupportedRotationError, known_norms, roles_of
from fastrot.sites import find_sites
from fastrot.transform_config import Rows, TransformArgs, TransformConfig, TransformScheme

Permuting = Callable[[Index, Mapping, int, bool], tuple[TransformArgs, ...]]
"""Where channels change places: of a model, its roles, how many there are, and whether the roles
are those of the table."""


@dataclass(frozen=True)
class Kind:
    """One of R1 to R4.

    Attributes:
        places: where it acts, from the roles and what the model has of them.
        check: refuses what is a matter of this rotation alone.
        head: the size of the head that it spans; None where it spans the whole dimension, so that
            a ``block_size`` for all is meant for it.
        per_layer: whether every layer may have its own.
        permuted: where channels change places before it, by the group's name; see
            ``Recipe.permutations``.
        through_norms: whether it passes the norms, and must fix the ones vector where one centres.
    """

    places: Callable[[Index, Mapping], tuple[TransformArgs, ...]]
    check: Callable[[Index, Mapping, Sequence[NormMapping]], None]
    head: Callable[[Index, Mapping], int | None] | None = None
    per_layer: bool = True
    permuted: tuple[str, Permuting] | None = None
    through_norms: bool = False


class Configured(NamedTuple):
    """What a recipe means for a model."""

    config: TransformConfig
    mapping: Mapping | None
    """The roles of its modules; None if a configuration of the user's names places by itself."""
    norms: tuple[NormMapping, ...]
    given: tuple[Rotation, ...] = ()
    """Matrices and permutations, which the configuration names by their digests."""


def configured(index: Index, recipe: Recipe) -> Configured:
    """What a recipe means for a model.

    Raises:
        UnsupportedRotationError: the model does not allow a rotation.
        RotationError: a block size that does not fit; a model that no row describes.
    """
    if recipe.transform_config is not None:
        norms = recipe.norm_mappings
        norms = known_norms(index) if norms is None else norms
        return Configured(recipe.transform_config, None, norms)
    wanted = recipe.rotations
    mapping, norms = roles_of(index, recipe.mappings, recipe.norm_mappings, wanted)
    for name in wanted:
        if not getattr(mapping, PLACES[name]):
            raise UnsupportedRotationError(
                f"{name} has no place in {index.class_name}: no module has the role {PLACES[name]}"
            )
        SPINQUANT[name].check(index, mapping, norms)
    sizes = _block_sizes(index, mapping, wanted, _given_sizes(recipe))
    centred = any(norm.kind == "layer" for norm in norms)
    matrices = {
        name: _fixing_ones(given) if centred and SPINQUANT[name].through_norms else given
        for name, given in (recipe.matrices or {}).items()
    }
    places = {name: SPINQUANT[name].places(index, mapping) for name in wanted}
    latents = mapping.latent_writers, mapping.latent_readers
    for places_of in (mapping.between, mapping.throughout, *latents):
        find_holders(index, places_of)  # they name something, whether it is asked for or not
    if recipe.keep_head:
        places[STREAM] = between_ends(index, mapping, norms, places[STREAM])
    permutations = recipe.permutations or {}
    schemes = dict(_permuting(index, mapping, permutations, recipe.by_table))
    schemes |= {
        name: TransformScheme(
            type=MATRIX if name in matrices else recipe.transform_type,
            apply=places[name],
            randomize=recipe.randomize and kind.per_layer and name not in matrices,
            head_dim=sizes[name],
            precision=recipe.precision or torch.float32,
            fixes_ones=centred and kind.through_norms,
            matrices=tuple(matrix.label for matrix in matrices.get(name, ())),
        )
        for name, kind in SPINQUANT.items()
        if name in wanted
    }
    given = (*chain(*matrices.values()), *chain(*permutations.values()))
    return Configured(TransformConfig(schemes), mapping, norms, given)


def _permuting(
    index: Index,
    mapping: Mapping,
    permutations: MappingABC[str, tuple[Rotation, ...]],
    by_table: bool,
) -> Iterator[tuple[str, TransformScheme]]:
    """The groups by which channels change places, before any rotation acts on them."""
    for name, given in permutations.items():
        permuted = SPINQUANT[name].permuted
        if permuted is None:
            raise RotationError(
                f"permutations: {name} takes none; a matrix of your own may hold one (matrices)"
            )
        group, places = permuted
        size = given[0].size
        labels = tuple(order.label for order in given)
        yield (
            group,
            TransformScheme(
                PERMUTATION, places(index, mapping, size, by_table), head_dim=size, matrices=labels
            ),
        )


def _fixing_ones(matrices: Iterable[Rotation]) -> tuple[Rotation, ...]:
    return tuple(Rotation.from_matrix(m.matrix(), fixes_ones=True) for m in matrices)


def _block_sizes(
    index: Index,
    mapping: Mapping,
    wanted: Sequence[str],
    given: MappingABC[str, int],
) -> dict[str, int | None]:
    """The block of every rotation; None spans the whole dimension."""
    heads = {name: kind.head for name, kind in SPINQUANT.items() if kind.head and name in wanted}
    sizes: dict[str, int | None] = dict.fromkeys(ROTATIONS)
    sizes |= {name: head(index, mapping) for name, head in heads.items()}
    for name, size in given.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"block_size of {name} must be an int, got {size!r}")
        if size < 1:
            raise RotationError(f"block_size of {name} must be positive, got {size}")
        head_dim = sizes[name]
        if head_dim is not None and head_dim % size:
            raise RotationError(f"block_size={size} of {name} does not divide head_dim {head_dim}")
        sizes[name] = size
    return sizes


def _given_sizes(recipe: Recipe) -> dict[str, int]:
    """The block sizes that a recipe names, and the orders of its matrices."""
    wanted, block_size, matrices = recipe.rotations, recipe.block_size, recipe.matrices or {}
    given: dict[str, int] = {}
    if isinstance(block_size, MappingABC):
        given = {str(name).upper(): size for name, size in block_size.items()}
        if len(given) < len(block_size):
            raise RotationError(f"block_size names a rotation twice: {', '.join(block_size)}")
    elif block_size is not None:
        whole = [name for name, kind in SPINQUANT.items() if kind.head is None]
        given = {name: block_size for name in whole if name in wanted}
        if not given:
            raise RotationError(
                f"block_size={block_size} is that of {' and '.join(whole)}, which are not among "
                f"{', '.join(wanted)}; give the others their own with a dict"
            )
        # Beside others a matrix keeps its order; alone it must be of this one.
        given = {name: size for name, size in given.items() if name not in matrices} or given
    for name in given:
        if name not in wanted:
            known = ROTATIONS if name not in ROTATIONS else wanted
            raise RotationError(f"block_size names {name!r}, not one of {', '.join(known)}")
    for name, (first, *others) in matrices.items():
        if others and not SPINQUANT[name].per_layer:
            raise RotationError(f"matrices: {name} acts on all layers alike; give one matrix")
        if given.setdefault(name, first.size) != first.size:
            raise RotationError(f"matrices: {name} has order {first.size}, its block_size another")
    return given


def _stream_places(index: Index, mapping: Mapping) -> tuple[TransformArgs, ...]:
    bare = mapping.transposed
    elsewhere = (*mapping.post_norm_in, *bare)
    places = [
        TransformArgs(mapping.stream_writers, "weight_output", ignore=elsewhere),
        TransformArgs(mapping.stream_readers, "weight_input", inverse=True, ignore=bare),
    ]
    if bare:
        writers = tuple(p for p in bare if p in mapping.stream_writers)
        readers = tuple(p for p in bare if p in mapping.stream_readers)
        places += [TransformArgs(writers, "weight_output", rows="transposed")] if writers else []
        if readers:
            places.append(TransformArgs(readers, "weight_input", inverse=True, rows="transposed"))
    if mapping.post_norm:
        places.append(TransformArgs(mapping.post_norm, "output"))
    return tuple(places)


def _check_head(index: Index, mapping: Mapping, norms: Sequence[NormMapping]) -> None:
    if find_sites(index, mapping.lm_head, missing_ok=True):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(index.config.model_type, "the causal model")
    raise NoMatchError(
        f"R1 rotates the residual stream from the embedding to the head, but no module of "
        f"{index.class_name} has the role lm_head; pass {whole}, or name its head in "
        "mappings= and norm_mappings="
    )


def _value_places(index: Index, mapping: Mapping) -> tuple[TransformArgs, ...]:
    if mapping.attn_gated:
        return _before(mapping.attn_o)
    uneven = differ(index, mapping)
    rows: Rows = "heads" if uneven else mapping.attn_v_rows
    places = (
        TransformArgs(mapping.attn_v, "weight_output", rows=rows),
        TransformArgs(
            mapping.attn_o, "weight_input", inverse=True, rows="heads" if uneven else "all"
        ),
    )
    # Rows of a projection that makes keys, too, can't be turned for the values alone.
    bare = without_values(index, mapping)
    return (*places, TransformArgs(bare, "input", rows="heads")) if bare else places


def _check_values(index: Index, mapping: Mapping, norms: Sequence[NormMapping]) -> None:
    check_heads(index, mapping, head_dim_of(index, mapping))


def _key_places(index: Index, mapping: Mapping) -> tuple[TransformArgs, ...]:
    """What is cached of the keys: these, or the latent that they are made from.

    With ``c`` the latent, ``γ`` the scale of the norm behind it and ``B`` what reads it,
    ``(c / rms(c)) diag(γ) Bᵀ = (c Q / rms(c Q)) (B diag(γ) Q)ᵀ``: the writer of ``c`` turns its
    outputs, the reader takes ``γ`` and turns its inputs, and ``c Q`` is cached.
    """
    if mapping.latent_writers:
        return (
            TransformArgs(mapping.latent_writers, "weight_output", rows="compressed"),
            TransformArgs(mapping.latent_readers, "weight_input", inverse=True),
        )
    return TransformArgs(mapping.attn, "q_attn"), TransformArgs(mapping.attn, "k_cache")


def _check_keys(index: Index, mapping: Mapping, norms: Sequence[NormMapping]) -> None:
    if mapping.latent_writers or mapping.latent_readers:
        check_latents(index, mapping, norms)
    elif mapping.attn_v_rows == "latent":
        raise UnsupportedRotationError(
            f"R3: {index.class_name} caches latents, not keys; name latent_writers and "
            "latent_readers in mappings, or leave it out"
        )


def _down_places(index: Index, mapping: Mapping) -> tuple[TransformArgs, ...]:
    return _before(mapping.mlp_out)


def _before(targets: tuple[str, ...]) -> tuple[TransformArgs, ...]:
    """Online on the input, and taken back in the weight."""
    return (
        TransformArgs(targets, "input"),
        TransformArgs(targets, "weight_input", inverse=True),
    )


SPINQUANT = {
    "R1": Kind(_stream_places, _check_head, per_layer=False, through_norms=True),
    "R2": Kind(_value_places, _check_values, head_dim_of),
    "R3": Kind(_key_places, _check_keys, key_dim_of),
    "R4": Kind(_down_places, lambda index, mapping, norms: None, permuted=("P4", middle_places)),
}
