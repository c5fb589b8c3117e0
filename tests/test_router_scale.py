"""A bare vector that scales what a norm makes is folded into its readers, as a norm's scale is."""

import pytest
import torch
from helpers import difference, fingerprint
from zoo import FAMILIES, build

import fastrot
from fastrot.mapping import NormMapping, find_architecture

SCALE, READER = r"re:.*\.router\.scale$", (r"re:.*\.router\.proj$",)


def applied(model, *norms):
    """R1 with these in the place of what the table says of the vector."""
    row = find_architecture(model.config)
    kept = tuple(norm for norm in row.norms if norm.kind != "scale")
    fastrot.apply(model, "R1", mappings=row.mapping, norm_mappings=(*kept, *norms), undo="none")


@pytest.fixture
def model():
    return build(FAMILIES["gemma4_experts"])


def test_it_becomes_one_and_its_reader_takes_it(model):
    scale = model.model.layers[0].router.scale.detach().clone()
    before = model.model.layers[0].router.proj.weight.detach().clone()
    fastrot.apply(model, "R1", undo="none", precision=torch.float64)
    router = model.model.layers[0].router
    assert torch.equal(router.scale, torch.ones_like(scale))
    lengths = (before * scale).norm(dim=1)  # a rotation keeps them
    torch.testing.assert_close(router.proj.weight.norm(dim=1), lengths, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (NormMapping(SCALE, READER), r"router\.scale .* is no bare vector of size 96 of kind"),
        (
            NormMapping(r"re:.*\.router\.per_expert_scale$", READER, kind="scale"),
            r"per_expert_scale \(\(4,\)\) is no bare vector of size 96",
        ),
        (
            NormMapping(r"re:.*\.router\.norm$", READER, kind="scale"),
            r"router\.norm \(Gemma4RMSNorm\) is no bare vector",
        ),
    ],
)
def test_another_thing_is_refused(model, norm, message):
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=message):
        applied(model, norm)
    assert difference(before, fingerprint(model)) == []


def test_without_it_the_vector_has_no_role(model):
    before = fingerprint(model)
    with pytest.raises(fastrot.RotationError, match=r"how model\.layers\.0\.router\.scale"):
        applied(model)
    assert difference(before, fingerprint(model)) == []


def test_a_plan_of_it_is_data(model):
    plan = fastrot.plan(model, "R1")
    assert "model.layers.0.router.scale" in plan.parameters
    assert fastrot.Plan.from_dict(plan.to_dict()) == plan
