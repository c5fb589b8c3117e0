"""``Recipe``: what a user wants of a model, and the one place where these options are listed."""

import inspect
from collections.abc import Callable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

import torch

from fastrot.arguments import parse_given, parse_norms, parse_rotations, parse_seed
from fastrot.checks import check_flag
from fastrot.errors import RotationError
from fastrot.mapping import STREAM, Mapping, NormMapping, as_mapping
from fastrot.rotations import KINDS, Rotation
from fastrot.transform_config import TransformConfig, parse_precision, parse_transform_config

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Recipe:
    """The rotations of a model, before it is known which one.

    Whatever means the same is accepted, and kept in one form: one name for several, dicts for data
    classes, names for dtypes. Recipes that mean the same are equal.

    Args:
        rotations: some of R1 (residual stream, fused), R2 (value heads, fused), R3 (queries and
            keys after RoPE, online; of latent attention the cached latent, fused) and R4 (input of
            the down projection, online and fused), in any letter case.
        transform_type: ``hadamard``, ``random-hadamard`` (seeded signs) or ``random-matrix``
            (uniformly random orthogonal; any size, dense and slow online).
        randomize: a rotation of its own for every layer in R2, R3 and R4 (``hadamard`` then draws
            signs, as one fixed matrix can't differ).
        block_size: block-diagonal rotations with blocks of this size for R1 and R4; R2 and R3
            always span one head. A dict gives each rotation its own, ``{"R4": 256}``.
        seed: of everything random.
        precision: dtype of the arithmetic, float64 or float32; online it is at least that of the
            activations. Default: float64 on weights, float32 on activations.
        matrices: orthogonal matrices of your own, learned for example, by the name of the rotation:
            one, or for R2, R3 and R4 a list with one for each layer. Their order is the block size.
        permutations: ``{"R4": order}``: the channels between the two halves of an MLP change
            places, in the weights, before R4 and its blocks: ``y[i] = x[order[i]]``; one order, or
            a list with one for each layer. It decides which channels share a block.
        keep_head: R1 leaves embedding, last norm and head alone, and acts online at the input of
            the first layer and, inverse, of the last norm: tied embeddings stay tied, and drafts
            of tokens that read the head and the embedding stay exact.
        mappings: the roles of a model that fastrot's table does not list.
        norm_mappings: its norms and their readers.
        transform_config: compressed-tensors' ``TransformConfig`` (object or dict); replaces
            ``rotations``, ``transform_type``, ``randomize``, ``block_size``, ``keep_head`` and
            ``mappings``. It
            may describe any transform on any linear module, so it is its author who answers for
            exactness. Its ``precision`` is that of online arithmetic.

    Raises:
        RotationError: an option has a value that no model allows.
        TypeError: an option of the wrong type.
    """

    rotations: tuple[str, ...] = ("R1", "R2")
    transform_type: str = "hadamard"
    randomize: bool = False
    block_size: int | MappingABC[str, int] | None = None
    seed: int = 0
    precision: torch.dtype | None = None
    matrices: MappingABC[str, tuple[Rotation, ...]] | None = None
    permutations: MappingABC[str, tuple[Rotation, ...]] | None = None
    keep_head: bool = False
    mappings: Mapping | None = None
    norm_mappings: tuple[NormMapping, ...] | None = None
    transform_config: TransformConfig | None = None

    def __post_init__(self) -> None:
        self._set("norm_mappings", parse_norms(self.norm_mappings))
        if self.transform_config is not None:
            self._set("transform_config", parse_transform_config(self.transform_config))
        self._set("rotations", parse_rotations(self.rotations))
        if self.mappings is not None:
            self._set("mappings", as_mapping(self.mappings))
        for name in ("matrices", "permutations"):
            given = getattr(self, name)
            if given is not None:
                self._set(name, parse_given(name, given, self.rotations) or None)
            if getattr(self, name) and self.transform_config is not None:
                raise RotationError(f"{name} are for rotations, not for a transform_config")
        check_flag("randomize", self.randomize)
        check_flag("keep_head", self.keep_head)
        if self.keep_head and STREAM not in self.rotations:
            raise RotationError(
                f"keep_head=True is of {STREAM}, which is not among {', '.join(self.rotations)}; "
                "leave it out"
            )
        if self.transform_type not in KINDS:
            raise RotationError(
                f"transform type {self.transform_type!r} is not one of {', '.join(KINDS)}"
            )
        if self.precision is not None:
            self._set("precision", parse_precision(self.precision))
        self._set("seed", parse_seed(self.seed))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def by_table(self) -> bool:
        """Whether fastrot's table says what the modules of a model do, not the user."""
        return self.mappings is None and self.transform_config is None

    @classmethod
    def of(
        cls, rotations: "str | Sequence[str] | Recipe", options: MappingABC[str, Any]
    ) -> "Recipe":
        """A recipe that was given, or one of its options.

        Raises:
            TypeError: an unknown option, or options beside a recipe.
        """
        options = dict(options)
        if options.pop("learnable", False):  # llm-compressor's name for it
            raise RotationError(
                "learnable=True: rotations are learned from text; call fastrot.apply(model, "
                "fastrot.learn(model, batches, rotations))"
            )
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise TypeError(f"there is no option {name!r}; {hint}")
        if not isinstance(rotations, Recipe):
            return cls(rotations, **options)  # type: ignore[arg-type]
        if options:
            raise TypeError(
                f"{', '.join(options)} beside a Recipe: set it in the recipe (dataclasses.replace)"
            )
        return rotations


def takes_recipe(function: Function) -> Function:
    """Show the options of a recipe in the signature of a function that takes them."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=f.type,
        )
        for f in fields(Recipe)
        if f.name not in signature.parameters
    ]
    shown = signature.replace(parameters=[*own, *options])
    function.__signature__ = shown  # type: ignore[attr-defined]
    return function
