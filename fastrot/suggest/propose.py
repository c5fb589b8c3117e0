"""From what was measured, and the names it was measured at, to a row of the tables."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import get_args

from torch import nn
from transformers import PreTrainedModel

from fastrot.coverage import classify
from fastrot.edits import Part
from fastrot.heads import head_size, value_part
from fastrot.mapping import (
    ROLES,
    Architecture,
    Mapping,
    Norm,
    NormMapping,
    Patterns,
    Untouched,
)
from fastrot.mapping.roles import NormKind, ValueRows
from fastrot.online import check_attention
from fastrot.sites import Site
from fastrot.suggest.names import Names
from fastrot.suggest.probe import Charges, Findings, Leg, turn_together

MEASURED = "measured: neither reads nor writes the residual stream"
MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|fc\d?\b", re.IGNORECASE)
KEY = re.compile(r"(^|_)kv?(_|\d|$)|key")

Sites = dict[str, Site]
Roles = dict[str, list[str]]


def propose(model: PreTrainedModel, findings: Findings, charges: Charges) -> Architecture:
    """The row of a small model that was probed."""
    names = Names(model)
    roles: Roles = defaultdict(list)
    readers, writers = _ends(findings, roles)
    blocks = _blocks(model, findings.sites.values())
    values = _values(model, blocks, readers, writers, findings, charges)
    roles |= {"attn": blocks, "attn_v": values[1] if values else []}
    roles["latent_writers"], roles["latent_readers"] = _latents(blocks, findings, charges)
    for name, site in readers.items():
        role = "mlp_in" if _is_mlp(model, site) else "readers"
        if _below(name, blocks):
            role = "attn_k" if KEY.search(name.rpartition(".")[2]) else "attn_q"
        role = "lm_head" if site.module is model.get_output_embeddings() else role
        if name not in roles["attn_v"]:
            roles[role].append(name)
    for name, site in writers.items():
        role = "mlp_out" if _is_mlp(model, site) else "writers"
        role = "attn_o" if _below(name, blocks) else role
        roles["embedding" if isinstance(site.module, nn.Embedding) else role].append(name)
    mapping = Mapping(
        **{role: names.patterns(found) for role, found in roles.items()},  # type: ignore[arg-type]
        attn_v_rows=values[0] if values else "all",
        attn_gated=bool(blocks) and not values,
    )
    norms = tuple(
        _norms(
            findings,
            names,
            readers,
            [*roles["attn_o"], *roles["mlp_out"], *roles["latent_readers"]],
        )
    )
    placed = classify(model, mapping, norms).keys() | findings.unclear.keys()
    rest = [name for name, _ in model.named_parameters() if name not in placed]
    ignore = tuple(Untouched(pattern, MEASURED) for pattern in names.patterns(rest, leaves=True))
    return row_of(replace(mapping, ignore=ignore), norms)


def _ends(findings: Findings, roles: Roles) -> tuple[Sites, Sites]:
    """Readers and writers; notes those that write into norms, and bare matrices (in, out)."""
    fed = {leg for norm in findings.norms.values() for leg in norm.readers}
    written = {leg for legs in findings.post_norms.values() for leg in legs}
    # A bias comes with its weight.
    biases = {site.bias for site in findings.sites.values()}
    biases |= {f"{norm}.bias" for norm in findings.norms}
    readers: Sites = {}
    writers: Sites = {}
    placed = biases | findings.sites.keys()
    for name, dim in findings.stream | written:
        if name not in placed:
            findings.unclear[name] = f"is a bare tensor, dimension {dim} of which is the stream's"
    for name, site in findings.sites.items():
        for leg in (Leg(name, dim) for dim in range(len(site.shape))):
            if name in biases or leg not in findings.stream | written:
                continue
            if leg.dim not in (site.input, site.output):
                findings.unclear[name] = f"lies along the stream with dimension {leg.dim}"
                continue
            flipped = site.is_bare and len(site.shape) == 2 and leg in fed and leg.dim == 0
            if flipped:
                roles["transposed"].append(site.name)
            if flipped or leg.dim == site.input:
                readers[site.name] = site
            else:
                writers[site.name] = site
            if leg in written:
                roles["post_norm_in"].append(site.name)
    roles["post_norm"] = [*findings.post_norms]
    return readers, writers


def _blocks(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The innermost modules that call themselves attention and project something.

    If some use transformers' attention interface and others do not, only those that do.
    """
    names = [site.name for site in sites]
    found = [
        name
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and sum(_below(site, [name]) for site in names) > 1
    ]
    found = [name for name in found if not any(_below(other, [name]) for other in found)]
    return [name for name in found if _on_interface(model, name)] or found


def _on_interface(model: nn.Module, name: str) -> bool:
    try:
        check_attention(name, model.get_submodule(name))
    except ValueError:
        return False
    return True


def _values(
    model: PreTrainedModel,
    blocks: list[str],
    readers: Sites,
    writers: Sites,
    findings: Findings,
    charges: Charges,
) -> tuple[ValueRows, list[str]] | None:
    """Which rows of which projections turn with the input of the output projection.

    None if there are none in some block: then something else, such as a gate, stands between. If
    the stream is not known, any projection may be the output projection, and becomes a writer.
    """
    sites = [site for site in findings.sites.values() if len(site.shape) > 1]
    for rows in get_args(ValueRows):
        found: dict[str, tuple[Site, Site]] = {}
        for block in blocks:
            own = [site for site in sites if _below(site.name, [block])]
            for v, o in permutations(own, 2):
                # Latents are no part of the stream, all other values read it.
                fits = o.name in writers and (v.name in readers) == (rows != "latent")
                if (fits or not findings.found) and _turns(model, block, v, o, rows, charges):
                    found[block] = v, o
        if blocks and len(found) == len(blocks):
            writers |= {o.name: o for _, o in found.values()}
            for _, o in found.values():
                readers.pop(o.name, None)
            return rows, [v.name for v, _ in found.values()]
    return None


def _turns(
    model: PreTrainedModel, block: str, v: Site, o: Site, rows: ValueRows, charges: Charges
) -> bool:
    """Whether the heads of ``v`` may be turned if those of ``o`` are turned back."""
    size = head_size(model.get_submodule(block), model.config.get_text_config())
    if size is None or o.input is None or o.shape[o.input] % size:
        return False
    try:
        length = v.shape[v.output]
        part = Part(1, length) if rows == "all" else value_part(model, v, rows)
    except ValueError:  # the layout does not fit
        return False
    if part.size % size or length % part.groups:
        return False
    legs = {Leg(o.weight, o.input): Part(1, o.shape[o.input]), Leg(v.weight, v.output): part}
    if v.bias is not None:
        legs[Leg(v.bias, 0)] = part
    return turn_together(charges, legs, size)


def _latents(
    blocks: list[str], findings: Findings, charges: Charges
) -> tuple[list[str], list[str]]:
    """What writes a latent that is cached, with a key behind it, and what reads it through a norm.

    The latent of queries has no key behind it, and none is cached.
    """
    writers, readers = [], []
    for block, (norm, found) in product(blocks, findings.norms.items()):
        own = [s for s in findings.sites.values() if _below(s.name, [block]) and len(s.shape) == 2]
        read = [site for site in own if Leg(site.weight, site.input or 0) in found.readers]
        if not read or not _below(norm, [block]) or len(read) != len(found.readers):
            continue
        legs = {leg: Part(1, found.size) for leg in found.readers}
        for site in own:
            behind = site.shape[site.output] - found.size
            if behind <= 0 or site in read:
                continue
            part = Part(1, found.size, behind)
            written = {Leg(site.weight, site.output): part}
            written |= {Leg(site.bias, 0): part} if site.bias else {}
            if turn_together(charges, written | legs, found.size):
                writers.append(site.name)
                readers += [site.name for site in read]
    return writers, readers


def _norms(
    findings: Findings, names: Names, readers: Sites, inner: list[str]
) -> Iterator[NormMapping]:
    """Norms that feed readers of the stream, or the projections that R2 and R4 rotate (inner)."""
    wanted, unfed = {*readers, *inner}, dict(readers)
    kinds: dict[tuple[str, float, NormKind], tuple[list[str], list[str]]] = {}
    for name, norm in findings.norms.items():
        read = {leg.name for leg in norm.readers}
        own = [site.name for name, site in findings.sites.items() if name in read]
        if own and wanted.issuperset(own):
            key = (names.general(name), norm.offset, norm.kind)
            kinds.setdefault(key, ([], []))
            kinds[key][0].append(name)
            kinds[key][1].extend(own)
            for reader in own:
                unfed.pop(reader, None)
    for (_, offset, kind), (found, own) in kinds.items():
        for pattern in names.patterns(found):
            yield NormMapping(pattern, names.patterns(own), offset, kind)
    if unfed:
        yield NormMapping(
            None, names.patterns([*unfed]), kind="layer" if findings.centred else "rms"
        )


def row_of(mapping: Mapping, norms: Sequence[NormMapping]) -> Architecture:
    """The row: a role is named where every norm feeds all of it or nothing of it."""
    forms = Counter((norm.offset, norm.kind) for norm in norms)
    usual: tuple[float, NormKind] = max(forms, key=forms.__getitem__, default=(0.0, "rms"))
    roles = {role: {*getattr(mapping, role)} for role in ROLES}
    whole = {
        role: patterns
        for role, patterns in roles.items()
        if patterns and all({*norm.linears} & patterns in (set(), patterns) for norm in norms)
    }
    feeds: dict[str | Norm | None, Patterns] = {}
    for norm in norms:
        readers, left = [], dict.fromkeys(norm.linears)
        for role, patterns in whole.items():
            if patterns <= left.keys():
                readers.append(role)
                left = {pattern: None for pattern in left if pattern not in patterns}
        form = (norm.offset, norm.kind)
        feeds[norm.norm if form == usual else Norm(norm.norm, *form)] = (*readers, *left)
    return Architecture(mapping, feeds, *usual)


def _below(name: str, owners: Collection[str]) -> bool:
    return any(name.startswith(f"{owner}.") for owner in owners)


def _is_mlp(model: nn.Module, site: Site) -> bool:
    owner = site.module if site.is_bare else model.get_submodule(site.name.rpartition(".")[0])
    return MLP.search(f"{site.name} {type(owner).__name__}") is not None
