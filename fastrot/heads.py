"""Attention heads: their sizes, and which rows of a projection are values."""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from torch import nn

from fastrot.edits import Part
from fastrot.errors import RotationError
from fastrot.index import Index, find_modules
from fastrot.mapping import Mapping, NormMapping
from fastrot.sites import Site, find_sites
from fastrot.transform_config import Rows

VALUE_NAMES = ("v_head_dim", "head_dim", "head_size", "dim_head")
KEY_NAMES = ("qk_head_dim", "head_dim", "head_size", "dim_head")
LATENT_NAMES = ("kv_lora_rank",)


def head_size(module: nn.Module, config: Any, names: tuple[str, ...] = VALUE_NAMES) -> int | None:
    """Size of one head: the attention module's own word, or the configuration's."""
    for holder in (module, config):
        for name in names:
            size = getattr(holder, name, None)
            if isinstance(size, int):
                return size
    return None


def head_around(index: Index, name: str) -> int:
    """Size of one value head in the attention block around a module.

    Raises:
        RotationError: there is none that says it.
    """
    for outer in reversed([*accumulate(name.split("."), "{}.{}".format)]):
        size = head_size(index.modules.get(outer, index.model), None)
        if size is not None:
            return size
    raise RotationError(f"{name} is in no attention block that says the size of its heads")


def lenders_of(index: Index) -> dict[str, str]:
    """The attention blocks that use keys and values of an earlier one, and which; they say so."""
    lending: dict[tuple[type, str], str] = {}
    found: dict[str, str] = {}
    for name, module in index.modules.items():
        lends = getattr(module, "store_full_length_kv", None)
        if not isinstance(lends, bool):
            continue
        kind = type(module), module.config.layer_types[module.layer_idx]  # type: ignore
        if lends:
            lending[kind] = name
        elif getattr(module, "is_kv_shared_layer", False) and kind in lending:
            found[name] = lending[kind]
    return found


def lender_of(lenders: dict[str, str], name: str) -> str:
    """The block that makes the keys and values which one, or a module right in it, uses."""
    block = name if name in lenders else name.rpartition(".")[0]
    return lenders.get(block, name)


def takes_keys_for_values(module: nn.Module) -> bool:
    """Whether an attention block has one projection for both; it says so."""
    return getattr(module, "use_alternative_attention", False) is True


def without_values(index: Index, mapping: Mapping) -> tuple[str, ...]:
    """The ``attn_o`` of all blocks whose values come out of the projection of the keys."""
    blocks, lenders = find_modules(index, mapping.attn), lenders_of(index)
    found = [
        block for block in blocks if takes_keys_for_values(index.modules[lender_of(lenders, block)])
    ]
    outputs = _inside(found, find_sites(index, mapping.attn_o, group="R2"))
    return tuple(name for names in outputs.values() for name in names)


def differ(index: Index, mapping: Mapping) -> bool:
    """Whether attention blocks differ in their values' heads, or in whether they make values."""
    blocks = find_modules(index, mapping.attn)
    odd = any(takes_keys_for_values(module) for module in blocks.values())
    return odd or bool(lenders_of(index)) or head_dim_of(index, mapping) is None


def key_dim_of(index: Index, mapping: Mapping) -> int | None:
    """Size of one key head; None if layers differ or do not say, or cache no keys but a latent."""
    if mapping.latent_writers:
        return None
    config = index.config.get_text_config()
    blocks = find_modules(index, mapping.attn).values()
    found = {head_size(module, config, KEY_NAMES) for module in blocks}
    return found.pop() if len(found) == 1 else None


def head_dim_of(index: Index, mapping: Mapping) -> int | None:
    """Size of one value head: the mapping's, the module's or the configuration's.

    None if layers differ, and every head has a projection's rows to itself.

    Raises:
        RotationError: none of them has it, or layers differ otherwise.
    """
    if mapping.attn_head_dim is not None:
        return mapping.attn_head_dim
    config = index.config.get_text_config()
    found = {head_size(m, config) for m in find_modules(index, mapping.attn).values()}
    if len(found) > 1 and None not in found and mapping.attn_v_rows == "all":
        return None
    if len(found) != 1 or not isinstance(size := found.pop(), int):
        raise RotationError(
            f"the head size of {index.class_name} is not one number ({found}); "
            "set attn_head_dim in mappings"
        )
    return size


def latent_part(model: nn.Module, site: Site) -> Part:
    """Where the latent lies among the outputs of what writes it: first, with a key behind it.

    Raises:
        RotationError: nothing says how wide it is, or it is wider than the outputs.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    module = model.get_submodule(site.name.rpartition(".")[0])
    size, length = head_size(module, config, LATENT_NAMES), site.shape[site.output]
    if size is None or not 0 < size <= length:
        raise RotationError(f"R3: {site.name} has {length} rows, and a latent of size {size}")
    return Part(1, size, length - size)


def check_latents(index: Index, mapping: Mapping, norms: Iterable[NormMapping]) -> None:
    """Refuse R3 on latents unless each has one size, and what stands before its readers is known.

    Layers may differ, if what writes and what reads a latent lie in one module.

    Raises:
        RotationError: one role is empty; sizes do not fit; a reader has no norm mapping.
    """
    if not (mapping.latent_writers and mapping.latent_readers):
        raise RotationError(
            "R3: latent_writers and latent_readers go together, one of them is empty in mappings"
        )
    writers = find_sites(index, mapping.latent_writers, group="R3").values()
    readers = find_sites(index, mapping.latent_readers, group="R3")
    written = {site.name: latent_part(index.model, site).size for site in writers}
    read = {
        name: site.shape[-1 if site.input is None else site.input] for name, site in readers.items()
    }
    near = {name.rpartition(".")[0]: name for name in written}
    first = next(iter(written))
    for name, size in read.items():
        writer = first if len({*written.values()}) == 1 else near.get(name.rpartition(".")[0])
        if writer is None or written[writer] != size:
            other = writer or first
            raise RotationError(
                f"R3: {other} has a latent of size {written[other]}, {name} one of {size}; "
                "leave R3 out"
            )
    fed = {name for norm in norms for name in find_sites(index, norm.linears, missing_ok=True)}
    if without := sorted(readers.keys() - fed):
        raise RotationError(
            f"R3: no norm mapping feeds {without[0]}; name its norm in norm_mappings "
            "(NormMapping(norm=None, …) if it reads the latent as it is)"
        )


def value_part(model: nn.Module, site: Site, rows: Rows) -> Part:
    """Where the values lie among the outputs of a fused projection.

    Raises:
        RotationError: the number of rows does not fit the heads.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    module = model.get_submodule(site.name.rpartition(".")[0])
    size, heads = head_size(module, config), getattr(config, "num_attention_heads", None)
    length = site.shape[site.output]
    if not isinstance(size, int) and isinstance(heads, int):
        size = int(config.hidden_size) // heads
    if not isinstance(heads, int) or not isinstance(size, int):
        raise RotationError(f"R2: {site.name} has {length} rows of {heads} heads of size {size}")
    if rows == "latent":
        # Keys need not have the size of values, so the rows need not be a multiple of it.
        if length % heads or length // heads <= size:
            raise RotationError(f"R2: {site.name} has {length} rows, not {heads} heads of [k | v]")
        return Part(heads, size)
    if length % size:
        raise RotationError(f"R2: {site.name} has {length} rows, no multiple of head size {size}")
    twice = length // size - heads
    if twice < 2 or twice % 2 or heads % (twice // 2):
        raise RotationError(
            f"R2: {site.name} has {length} rows, which are not {heads} query heads of size {size} "
            "and as many keys as values"
        )
    kv_heads = twice // 2
    return Part(1, kv_heads * size) if rows == "qkv" else Part(kv_heads, size)


def check_heads(index: Index, mapping: Mapping, head_dim: int | None) -> None:
    """Refuse R2 unless every attention block has one value and one output projection to rotate.

    A block that takes its keys for values, or uses the values of another, needs the output alone.

    Args:
        index: the model.
        mapping: its roles.
        head_dim: size of a value head; None where layers differ.
    """
    blocks = find_modules(index, mapping.attn)
    roles = [mapping.attn_o] if mapping.attn_gated else [mapping.attn_v, mapping.attn_o]
    found = [[*find_sites(index, patterns, group="R2")] for patterns in roles]
    inside = [_inside(blocks, names) for names in found]
    config, lenders = index.config.get_text_config(), lenders_of(index)
    for block, module in blocks.items():
        own = [names[block] for names in inside]
        bare = not own[0] and (block in lenders or takes_keys_for_values(module))
        if any(len(names) != 1 for names in own[bare:]):
            raise RotationError(
                f"R2: {block} needs one attn_v and one attn_o in mappings, "
                f"found {' and '.join(map(str, own))}"
            )
        actual = head_size(module, config)
        if head_dim is not None and actual not in (None, head_dim):
            raise RotationError(
                f"R2: {block} has heads of size {actual}, mappings says attn_head_dim={head_dim}"
            )
    settled = {name for each in inside for names in each.values() for name in names}
    if stray := [name for names in found for name in names if name not in settled]:
        raise RotationError(f"R2: {', '.join(stray[:4])} is in no attention block that attn names")


def _inside(blocks: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """The names inside each block, however deep."""
    inside: dict[str, list[str]] = {block: [] for block in blocks}
    for name in names:
        for outer in accumulate(name.split(".")[:-1], "{}.{}".format):
            if outer in inside:
                inside[outer].append(name)
    return inside
