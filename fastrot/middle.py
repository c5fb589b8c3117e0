"""The channels in the middle of an MLP: between what reads the stream and the down projection."""

from collections.abc import Mapping as MappingABC

from fastrot.coverage import classify
from fastrot.errors import RotationError
from fastrot.index import Index
from fastrot.mapping import Mapping
from fastrot.rows import UnsupportedRotationError
from fastrot.sites import Site, find_sites
from fastrot.transform_config import TransformArgs


def middle_places(
    index: Index, mapping: Mapping, size: int, by_table: bool
) -> tuple[TransformArgs, ...]:
    """Where these channels change places: in the outputs of gate and up, in the inputs of down.

    An activation that acts on every channel alike does not notice. Gate and up in one matrix are
    two blocks of outputs.

    Args:
        index: of the model.
        mapping: its roles.
        size: how many channels there are.
        by_table: whether the roles are those of fastrot's table, where gate and up in one matrix
            lie one behind the other.

    Raises:
        UnsupportedRotationError: an MLP has another number of channels, is none of linear modules
            (stacked experts, routers), or has more parameters or buffers of that size.
    """
    downs = find_sites(index, mapping.mlp_out).values()
    ups = find_sites(index, mapping.mlp_in).values()
    around = {_owner(site) for site in downs}
    for owner in sorted(around - {_owner(site) for site in ups}):
        raise _unsupported(index, f"nothing in {owner} has the role mlp_in")
    for site in (*downs, *ups):
        channels = site.shape[site.input if site in downs else site.output]  # type: ignore[index]
        if site.is_bare or _owner(site) not in around:
            raise _unsupported(index, f"{site.name} is not in an MLP of linear modules")
        if channels != size and not (by_table and site in ups and channels == 2 * size):
            raise _unsupported(index, f"{site.name} has {channels} channels, the order {size}")
    roles = classify(index, mapping, ())
    known = {name for site in (*downs, *ups) for name in (site.weight, site.bias)}
    for owner in around:
        module = index.modules[owner]
        tensors = [*module.named_parameters(owner), *module.named_buffers(owner)]
        for name, tensor in tensors:
            wide = tensor.numel() >= size and not _has_role(roles, name)
            if name not in known and (size in tensor.shape or wide):
                raise _unsupported(index, f"{name} of the same size would not change with them")
    return (
        TransformArgs(mapping.mlp_in, "weight_output"),
        TransformArgs(mapping.mlp_out, "weight_input", inverse=True),
    )


def _has_role(roles: MappingABC[str, str], name: str) -> bool:
    return not roles.get(name, "untouched").startswith("untouched")


def _owner(site: Site) -> str:
    return site.name.rpartition(".")[0]


def _unsupported(index: Index, why: str) -> RotationError:
    return UnsupportedRotationError(
        f"permutations of R4: the channels of {index.class_name} can't change places, {why}; leave "
        "permutations out"
    )
