"""A row names the readers of the residual stream once, by role; norms follow from that."""

from dataclasses import replace

import pytest

from fastrot.mapping import ARCHITECTURES, ROLES, Architecture, Mapping, Norm, NormMapping
from fastrot.suggest.propose import row_of

ROW = Architecture(
    Mapping(attn_q="q", mlp_in=("gate", "up"), readers=("router", "side"), lm_head="lm_head"),
    {"first": ("attn_q", "readers"), "second": "mlp_in", "last": "lm_head"},
    offset=1.0,
)


def test_norms_are_the_roles_in_patterns():
    assert ROW.norms == (
        NormMapping("first", ("q", "router", "side"), 1.0),
        NormMapping("second", ("gate", "up"), 1.0),
        NormMapping("last", ("lm_head",), 1.0),
    )


@pytest.mark.parametrize("change", [{"mlp_in": "fused"}, {"mapping": Mapping(mlp_in="fused")}])
def test_another_role_needs_no_norms(change):
    assert NormMapping("second", ("fused",), 1.0) in ROW.replace(**change).norms


def test_a_mapping_and_roles_go_together():
    row = ROW.replace(mapping=Mapping(mlp_in="fused"), attn_q="qkv", notes="new")
    assert row == replace(ROW, mapping=Mapping(attn_q="qkv", mlp_in="fused"), notes="new")


def test_a_norm_without_readers_is_left_out():
    assert [norm.norm for norm in ROW.replace(lm_head=(), mlp_in=()).norms] == ["first"]


def test_a_role_stands_for_what_no_norm_names_itself():
    row = ROW.replace(feeds={**ROW.feeds, "third": "router", None: ("up", "other")})
    assert {norm.norm: norm.linears for norm in row.norms} == {
        "first": ("q", "side"),
        "second": ("gate",),
        "last": ("lm_head",),
        "third": ("router",),
        None: ("up", "other"),
    }


def test_one_norm_may_differ():
    row = ROW.replace(
        kind="layer", feeds={"first": "attn_q", Norm("last", kind="scale"): "lm_head"}
    )
    forms = [(norm.norm, norm.offset, norm.kind) for norm in row.norms]
    assert forms == [("first", 1.0, "layer"), ("last", 0.0, "scale")]


def test_what_is_no_field_is_refused():
    with pytest.raises(TypeError, match="mlp_inn"):
        ROW.replace(mlp_inn="fused")
    with pytest.raises(TypeError, match="feeds must be a pattern or a list of patterns, got 3"):
        ROW.replace(feeds={"first": 3})


def rows():
    for found in ARCHITECTURES.values():
        yield from found if isinstance(found, tuple) else (found,)


def test_tables_name_no_norm_twice():
    """A norm under its name and as a ``Norm`` would scale its readers twice."""
    for row in rows():
        names = [getattr(norm, "norm", norm) for norm in row.feeds]
        assert len({*names}) == len(names)
        words = {reader for readers in row.feeds.values() for reader in readers}
        assert {word for word in words if word.isidentifier()} <= {*ROLES}


def pairs(row):
    return {(n.norm, p, n.offset, n.kind) for n in row.norms for p in n.linears}


SPLIT = ROW.replace(feeds={"first": ("q", "gate"), "second": ("up", "gate"), None: "router"})


@pytest.mark.parametrize("row", [*rows(), SPLIT])
def test_roles_are_found_again_in_norms(row):
    """As a suggestion does, which knows norms and patterns."""
    assert pairs(row_of(row.mapping, row.norms)) == pairs(row)


def test_a_suggestion_speaks_of_roles():
    assert row_of(ROW.mapping, ROW.norms) == ROW
