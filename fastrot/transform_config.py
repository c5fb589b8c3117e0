"""The transform configuration, in the schema of compressed-tensors' ``TransformConfig``.

R1 to R4 are such a configuration, see :mod:`fastrot.spinquant`; a user's own takes the same way
through the plan.

With row vectors and ``T`` the matrix of the scheme (its transpose if ``inverse``):

================  =======================  =====================================
location          where                    meaning
================  =======================  =====================================
``input``         online, module input     x → x T
``output``        online, module output    y → y T
``q_attn``        online, after RoPE       q → q T, every head
``k_cache``       online, before caching   k → k T, every head
``weight_input``  fused                    W → W Tᵀ, so that (x T)(W Tᵀ)ᵀ = x Wᵀ
``weight_output`` fused                    W → Tᵀ W and b → b T, so that y → y T
================  =======================  =====================================

Beyond that schema, and written only where needed, are ``rows`` of a place and ``fixes_ones`` of a
scheme.
"""

from collections.abc import Iterable
from collections.abc import Mapping as MappingABC
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from fastrot.checks import check_flag
from fastrot.errors import RotationError
from fastrot.mapping import as_patterns
from fastrot.rotations import GIVEN, KINDS, PERMUTATION

FUSED_LOCATIONS = ("weight_input", "weight_output")
ATTENTION_LOCATIONS = ("q_attn", "k_cache")
LOCATIONS = ("input", "output", *FUSED_LOCATIONS, *ATTENTION_LOCATIONS)
PRECISIONS = (torch.float64, torch.float32)
Rows = Literal["all", "heads", "transposed", "qkv", "grouped", "latent", "compressed"]


@dataclass(frozen=True)
class TransformArgs:
    """Where a transform acts.

    Attributes:
        targets: patterns of modules, see :mod:`fastrot.mapping`.
        location: one of :data:`LOCATIONS`.
        inverse: use the transpose.
        ignore: patterns of modules that are left out of ``targets``.
        rows: ``all``; ``heads``, each head by itself, whose size is that of the attention block
            around, and whose rotation is that of the layer the values are made in;
            ``transposed`` for bare matrices (in, out); ``compressed``, the first, which are the
            latent of latent attention; otherwise only the values, see ``Mapping.attn_v_rows``.
    """

    targets: tuple[str, ...]
    location: str
    inverse: bool = False
    ignore: tuple[str, ...] = ()
    rows: Rows = "all"

    def __post_init__(self) -> None:
        for name in ("targets", "ignore"):
            object.__setattr__(self, name, as_patterns(name, getattr(self, name)))
        check_flag("inverse", self.inverse)
        location = getattr(self.location, "value", self.location)
        object.__setattr__(self, "location", location)
        if location not in LOCATIONS:
            raise RotationError(f"location {location!r} is not one of {', '.join(LOCATIONS)}")
        if self.rows not in get_args(Rows):
            raise RotationError(f"rows {self.rows!r} is not one of {', '.join(get_args(Rows))}")


@dataclass(frozen=True)
class TransformScheme:
    """One rotation and all places where it acts.

    Attributes:
        type: a :data:`~fastrot.rotations.RotationKind`; ``matrix`` and ``permutation`` are beyond
            compressed-tensors' schema.
        apply: the places.
        randomize: a rotation of its own for every decoder layer.
        requires_grad: learned transforms; refused, fastrot does not train rotations.
        head_dim: block size; None takes the whole dimension.
        precision: dtype of online arithmetic, at least that of the activations; fused arithmetic
            has a dtype of its own, float64 unless :func:`fastrot.apply` is told otherwise.
        matrices: digests of the given ones of type ``matrix`` or ``permutation``: one, or one for
            each layer.
    """

    type: str
    apply: tuple[TransformArgs, ...] = ()
    randomize: bool = False
    requires_grad: bool = False
    head_dim: int | None = None
    precision: torch.dtype = torch.float32
    fixes_ones: bool = False
    matrices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", as_patterns("matrices", self.matrices))
        if bool(self.matrices) != (self.type in GIVEN):
            raise RotationError(f"transform type {self.type!r} with {len(self.matrices)} matrices")
        if self.type not in (*KINDS, *GIVEN):
            raise RotationError(f"transform type {self.type!r} is not one of {', '.join(KINDS)}")
        check_flag("requires_grad", self.requires_grad)
        if self.requires_grad:
            raise RotationError(
                "requires_grad=True: fastrot does not learn rotations; set it to False"
            )
        object.__setattr__(self, "precision", parse_precision(self.precision))
        check_flag("randomize", self.randomize)
        check_flag("fixes_ones", self.fixes_ones)
        size = self.head_dim
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise TypeError(f"head_dim must be an int or None, got {size!r}")
        if isinstance(self.apply, str) or not isinstance(self.apply, Iterable):
            raise TypeError(f"apply must be a list, got {self.apply!r}")
        apply = tuple(_parse(TransformArgs, args, "apply") for args in self.apply)
        object.__setattr__(self, "apply", apply)
        online = [args.location for args in apply if args.location not in FUSED_LOCATIONS]
        if self.type == PERMUTATION and online:
            raise RotationError(f"a permutation acts in weights alone, not at {online[0]}")


@dataclass(frozen=True)
class TransformConfig:
    """Named schemes; R1 to R4 carry their names."""

    config_groups: dict[str, TransformScheme]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data that compressed-tensors' ``TransformConfig`` validates."""
        groups = {name: asdict(scheme) for name, scheme in self.config_groups.items()}
        for group in groups.values():
            group["precision"] = str(group["precision"])
            for name in ("fixes_ones", "matrices"):
                if not group[name]:
                    del group[name]
            if "matrices" in group:
                group["matrices"] = list(group["matrices"])
            group["apply"] = [
                {**args, "targets": list(args["targets"]), "ignore": list(args["ignore"])}
                for args in group["apply"]
            ]
            for args in group["apply"]:
                if args["rows"] == "all":
                    del args["rows"]
        return {"config_groups": groups}


def parse_precision(value: torch.dtype | str) -> torch.dtype:
    """float64 or float32, from a dtype or its name.

    Raises:
        RotationError: anything else: rotating in 16 bits would round after every step.
    """
    parsed = (
        getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    )
    if parsed not in PRECISIONS:
        raise RotationError(f"precision={value} is not torch.float64 or torch.float32")
    return parsed


def parse_transform_config(value: Any) -> TransformConfig:
    """A configuration from itself, a dict, or compressed-tensors' pydantic object.

    Raises:
        RotationError: unknown or missing fields, unknown types or locations.
        TypeError: something that is no configuration at all.
    """
    if isinstance(value, TransformConfig):
        return value
    data = _as_dict(value, "transform_config")
    groups = data.get("config_groups")
    if set(data) != {"config_groups"} or not isinstance(groups, MappingABC) or not groups:
        raise RotationError(
            "transform_config needs exactly one field, 'config_groups', with at least one scheme; "
            f"got {', '.join(map(str, data)) or 'nothing'}"
        )
    return TransformConfig(
        {str(name): _parse(TransformScheme, scheme, str(name)) for name, scheme in groups.items()}
    )


def _as_dict(value: Any, where: str) -> dict[str, Any]:
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if not isinstance(value, MappingABC):
        raise TypeError(f"{where}: expected a dict, got {type(value).__name__} {value!r}")
    return dict(value)


def _parse(cls: type[Any], value: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    data = _as_dict(value, where)
    known = {field.name: field for field in fields(cls)}
    unknown = sorted(set(data) - set(known))
    missing = [n for n, f in known.items() if f.default is MISSING and n not in data]
    if unknown or missing:
        problem = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise RotationError(f"transform_config, {where}: {problem}; fields: {', '.join(known)}")
    try:
        return cls(**data)
    except (TypeError, ValueError) as error:
        raise type(error)(f"transform_config, {where}: {error}") from None
