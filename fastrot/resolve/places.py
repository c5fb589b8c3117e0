"""The places of a configuration, and the rotation that acts at each."""

from collections.abc import Iterator
from dataclasses import replace

from fastrot.errors import RotationError
from fastrot.index import Index
from fastrot.rotations import Rotation
from fastrot.transform_config import (
    FUSED_LOCATIONS,
    TransformArgs,
    TransformConfig,
    TransformScheme,
)


def places(
    config: TransformConfig, online: bool
) -> Iterator[tuple[str, TransformScheme, TransformArgs]]:
    """Group, scheme and place of everything that acts online, or in the weights."""
    for group, scheme in config.config_groups.items():
        for args in scheme.apply:
            if (args.location not in FUSED_LOCATIONS) == online:
                yield group, scheme, args


def rotation_of(
    index: Index,
    group: str,
    scheme: TransformScheme,
    name: str,
    size: int,
    seed: int,
    head: int | None = None,
) -> Rotation:
    """The rotation of a scheme at the module or parameter ``name``.

    Places whose blocks are the same share their operand, which is made but once.

    Args:
        index: where rotations are kept.
        group: the name of the scheme.
        scheme: what it says.
        name: decides which layer's rotation it is.
        size: of the dimension.
        seed: of random rotations.
        head: what blocks must not reach beyond; the default block.

    Raises:
        ValueError: the size does not allow it.
    """
    if head is not None and scheme.head_dim and head % scheme.head_dim:
        raise RotationError(
            f"block_size={scheme.head_dim} of {group} does not divide the heads of {name}, {head}"
        )
    kind, label = scheme.type, group
    if scheme.matrices:
        seed, label = 0, _matrix_of(index, group, scheme, name)
    elif scheme.randomize:
        # One fixed matrix can't differ between layers: give each its signs.
        kind = "random-hadamard" if kind == "hadamard" else kind
        label = f"{group}.{layer_of(name)}"
    try:
        rotation = Rotation(
            kind,  # type: ignore[arg-type]
            size,
            head if scheme.head_dim is None else scheme.head_dim,
            seed,
            label,
            scheme.fixes_ones,
        )
    except ValueError as error:
        raise type(error)(f"{group} of {name}: {error}") from None
    if rotation not in index.rotations:
        unit = replace(rotation, size=rotation.block, block_size=None)
        unit = index.units.setdefault(unit, unit)
        index.rotations[rotation] = replace(rotation, unit=unit)
    return index.rotations[rotation]


def _matrix_of(index: Index, group: str, scheme: TransformScheme, name: str) -> str:
    """The digest of the matrix that is meant for the layer of ``name``."""
    count = len(scheme.matrices)
    if count == 1:
        return scheme.matrices[0]
    number = layer_of(name).rpartition(".")[2]
    if not number.isdigit() or int(number) >= count:
        raise RotationError(
            f"{group}: there are {count}, one for each layer, but none for {name}; give one for "
            "each, or a single one for all"
        )
    stack = name[: name.index(f".{number}.")]
    layers = len(list(index.modules[stack].children()))
    if count > layers:
        raise RotationError(
            f"{group}: there are {count}, one for each layer, but {stack} has {layers}; give one "
            "for each, or a single one for all"
        )
    return scheme.matrices[int(number)]


def layer_of(name: str) -> str:
    """``layers.3`` of any module inside that layer, whatever the model around it is called."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[max(index - 1, 0) : index + 1])
