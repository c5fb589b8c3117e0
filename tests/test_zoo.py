"""Every row of the tables, on a tiny random model of the family: exact, and every edit matters."""

import copy
import re
from dataclasses import fields, replace
from functools import cache, lru_cache, partial
from itertools import product

import pytest
import torch
from helpers import relative_error
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import FAMILIES, build, inputs

import fastrot
import fastrot.rows
from fastrot.edits import Scale
from fastrot.index import Index
from fastrot.mapping import ARCHITECTURES, SHELLS, find_architecture

ROTATIONS = ("R1", "R2", "R3", "R4")
KINDS = ("hadamard", "random-hadamard")
EVERY = pytest.mark.parametrize("name", FAMILIES, scope="module")
"""Of this scope, so that the tests of a family follow one another and share its model."""


@lru_cache(maxsize=4)
def original(name, dtype=torch.float64):
    """The model before rotation, its inputs, and its logits."""
    family = FAMILIES[name]
    model = build(family, dtype)
    given = inputs(family, model)
    return model, given, logits(model, given)


@torch.no_grad()
def logits(model, given, **settings):
    floats = {k: v.to(model.dtype) for k, v in given.items() if v.is_floating_point()}
    return model(**(given | floats), **settings).logits.double()


@cache
def config_of(name):
    """With what the model itself sets there."""
    return original(name)[0].config


@lru_cache(maxsize=4)
def allowed(name):
    """The rotations that the family's row does not refuse."""
    model, _, _ = original(name)
    found = []
    for rotation in ROTATIONS:
        try:
            fastrot.plan(model, rotation)
        except fastrot.UnsupportedRotationError:
            continue
        found.append(rotation)
    return tuple(found)


def error_of(name, rotations, dtype=torch.float64, **kwargs):
    model, given, before = original(name, dtype)
    model = copy.deepcopy(model)
    fastrot.apply(model, rotations, undo="none", **kwargs)
    return relative_error(logits(model, given), before)


def check_exact(name, cases):
    for rotations, kind, dtype in cases:
        settings, limit = {"transform_type": kind}, 1e-5
        if dtype == torch.float64:
            limit = FAMILIES[name].exact
            settings |= {"precision": dtype, "randomize": rotations == allowed(name)}
        error = error_of(name, rotations, dtype, **settings)
        assert error <= limit, (rotations, kind, dtype, error)


def cases(name, every=False):
    """Each rotation and all of them, with one kind and dtype, or with every combination.

    What one family leaves out is that of the next three.
    """
    sets, place = [*allowed(name), allowed(name)], list(FAMILIES).index(name)
    axes = map(enumerate, (sets, KINDS, (torch.float64, torch.float32)))
    for (i, rotations), (k, kind), (d, dtype) in product(*axes):
        if every or (place + i + k + 2 * d) % 4 == 0:
            yield rotations, kind, dtype


@pytest.mark.ours
@EVERY
def test_exact(name):
    possible = allowed(name)
    assert possible, "a family of which nothing can be rotated"
    check_exact(name, [case for case in cases(name) if case[0] == possible])


@pytest.mark.ours
@EVERY
def test_each_rotation_is_exact(name):
    check_exact(name, [case for case in cases(name) if case[0] != allowed(name)])


@pytest.mark.exhaustive
@EVERY
def test_every_case_is_exact(name):
    check_exact(name, cases(name, every=True))


class WithoutCasts(TorchFunctionMode):
    """What a model casts to float32 inside (norms, routers, softmax) stays float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


@EVERY
def test_exact_to_the_last_digits_without_the_models_own_casts(name):
    family = FAMILIES[name]
    model = build(family)
    given = inputs(family, model)
    rotations = allowed(name)  # not inside: others share the model that this builds
    with WithoutCasts():
        before = logits(model, given)
        fastrot.apply(model, rotations, precision=torch.float64, undo="none")
        assert relative_error(logits(model, given), before) <= 1e-12
        assert relative_error(logits(model, given, use_cache=False), before) <= 1e-12


def without_one(model, plan):
    """For each single step, reset and online site: what a rotated model is like without it.

    As the value of a parameter, or as the rest of the plan.
    """
    for edit in plan.weights:
        for skipped, step in enumerate(edit.steps):
            rest = replace(edit, steps=(*edit.steps[:skipped], *edit.steps[skipped + 1 :]))
            yield f"{edit.parameter}: {step}", partial(dense_product, model, rest)
    for norm in plan.norms:
        if norm.weighted:
            parameter = model.get_parameter(norm.parameter)
            yield f"{norm.parameter}: reset", parameter.detach
    for i, site in enumerate(plan.online):
        if site.location != "k_cache":  # without it the queries' hook has no partner to check
            sites = (*plan.online[:i], *plan.online[i + 1 :])
            yield f"{site.module}: {site}", replace(plan, online=sites)


def check_edits(name, chosen=dict.items):
    """Nothing is exact without one of the edits ``chosen`` from all, by their names."""
    model, given, before = original(name)
    settings = {"transform_type": "random-hadamard", "precision": torch.float64}
    whole = fastrot.plan(model, allowed(name), **settings)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, whole, undo="none")
    assert relative_error(logits(rotated, given), before) <= FAMILIES[name].exact
    for what, rest in chosen(dict(without_one(model, whole))):
        if callable(rest):
            parameter = rotated.get_parameter(what.split(": ")[0])
            kept, parameter.data = parameter.data, rest()
            found = logits(rotated, given)
            parameter.data = kept
        else:
            changed = copy.deepcopy(model)
            fastrot.apply(changed, rest)
            found = logits(changed, given)
        error = relative_error(found, before)
        unread = what.split(":")[0].endswith(FAMILIES[name].unread)
        assert unread or error > 1e-3, (what, error)
    assert relative_error(logits(rotated, given), before) <= FAMILIES[name].exact


def one_of_each(edits):
    """Of edits that differ in the numbers of their names only, layers and experts, the last."""
    return {re.sub(r"\.\d+\b", ".#", what): (what, rest) for what, rest in edits.items()}.values()


@cache
def first_of_each_row():
    """A family of every row of the tables, and of every shell."""
    found = {}
    for name, family in FAMILIES.items():
        config = CONFIG_MAPPING[family.model_type](**family.config)
        found.setdefault(str((find_architecture(config), SHELLS.get(family.model_type))), name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each_row(), scope="module")
def test_every_kind_of_edit_matters(name):
    check_edits(name, one_of_each)


@pytest.mark.exhaustive
@EVERY
def test_every_single_edit_matters(name):
    check_edits(name)


def dense_product(model, edit):
    """The edit by dense float64 matrices."""
    weight = model.get_parameter(edit.source or edit.parameter).detach().double()
    for step in edit.steps:
        vectors = weight.movedim(step.dim, -1)
        if isinstance(step, Scale):
            gamma = model.get_parameter(step.norm).detach().double() + step.offset
            vectors = vectors / gamma if step.inverse else vectors * gamma
        else:
            matrix = step.rotation.matrix()
            matrix = matrix.T if step.inverse else matrix
            if step.part is not None:
                each = vectors.shape[-1] // step.part.groups
                behind = torch.eye(step.part.behind).double()
                before = torch.eye(each - step.part.size - step.part.behind).double()
                block = torch.block_diag(before, matrix, behind)
                matrix = torch.block_diag(*[block] * step.part.groups)
            vectors = vectors @ matrix
        weight = vectors.movedim(-1, step.dim)
    return weight


@pytest.mark.ours
@EVERY
def test_every_weight_is_the_dense_product_rounded_once(name):
    model, _, _ = original(name, torch.float32)
    plan = fastrot.plan(model, allowed(name), transform_type="random-hadamard")
    exact = {edit.parameter: dense_product(model, edit) for edit in plan.weights}
    model = copy.deepcopy(model)
    fastrot.apply(model, allowed(name), transform_type="random-hadamard", undo="none")
    for parameter, wanted in exact.items():
        got = model.get_parameter(parameter).detach().double()
        # Of two neighbours equally near, within float64's own error, either will do.
        nearest = (wanted.float().double() - wanted).abs()
        assert ((got - wanted).abs() <= nearest + 1e-14 * wanted.abs().max()).all(), parameter


@EVERY
def test_the_row_is_complete(name):
    """Every parameter has a role, every reader a norm; what the row ignores has a reason."""
    from fastrot.coverage import classify

    model, _, _ = original(name)
    row = fastrot.rows.present(Index(model), find_architecture(model.config))
    roles = classify(model, row.mapping, row.norms)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if "R1" not in row.refuses:
        assert [n for n in names if n not in roles] == []
    assert [u.pattern for u in row.mapping.ignore if not u.reason] == []


@pytest.mark.ours
def test_no_row_and_no_rule_is_unused():
    """Every row is that of a family in the zoo, and each of its patterns names something there."""
    types, unused = set(), {}
    for name in FAMILIES:
        config = config_of(name)
        types |= {config.model_type, config.get_text_config().model_type}
        row = find_architecture(config)
        used = set(patterns_of(fastrot.rows.present(Index(original(name)[0]), row)))
        shell = SHELLS.get(config.model_type)
        # The patterns of a language model in a shell are tried without it.
        fed = {("norm", getattr(norm, "norm", norm)) for norm in row.feeds}
        rules = fed.union(patterns_of(row)) if shell is None else set(rules_of(shell))
        unused.setdefault(frozenset(rules), set(rules)).difference_update(used)
    assert {name for name in (*ARCHITECTURES, *SHELLS) if name in CONFIG_MAPPING} <= types
    assert [left for left in unused.values() if left] == []


def rules_of(shell):
    yield from (("writers", pattern) for pattern in shell.writers)
    yield from (("readers", pattern) for pattern in shell.readers)
    yield from (("transposed", pattern) for pattern in shell.transposed)
    yield from (("post_norm", pattern) for pattern in shell.post_norm)
    yield from (("ignore", untouched.pattern) for untouched in shell.ignore)


def patterns_of(row):
    """Every pattern of a row, with the role in which it stands."""
    for role in fields(row.mapping):
        value = getattr(row.mapping, role.name)
        if isinstance(value, tuple):
            yield from ((role.name, v.pattern if role.name == "ignore" else v) for v in value)
    for norm in row.norms:
        yield ("norm", norm.norm)
        yield from (("linears", pattern) for pattern in norm.linears)


def test_every_row_of_every_model_type_is_tried():
    """A model type with several rows needs a family for each."""
    tried = {}
    for name in FAMILIES:
        config = config_of(name).get_text_config()
        when = str(find_architecture(config).when) if config.model_type in ARCHITECTURES else ""
        tried.setdefault(config.model_type, set()).add(when)
    for model_type, rows in ARCHITECTURES.items():
        if model_type in tried and isinstance(rows, tuple):
            assert {str(row.when) for row in rows} == tried[model_type], model_type


@EVERY
def test_generate_and_save(name, tmp_path):
    model, given, _ = original(name, torch.float32)
    model = copy.deepcopy(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        tokens = model.generate(**given, **settings, eos_token_id=None)
    fastrot.apply(model, allowed(name), transform_type="random-hadamard", randomize=True)
    with torch.no_grad():
        assert torch.equal(model.generate(**given, **settings, eos_token_id=None), tokens)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    # Products round differently where memory begins elsewhere.
    torch.testing.assert_close(logits(loaded, given), logits(model, given), rtol=1e-5, atol=1e-5)
