"""Learned rotations: orthogonal to the last digit, exact as any other, judged by the gate."""

import copy
import gc
import json
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
from helpers import difference, fingerprint, logits, random_ids, relative_error, tiny
from safetensors import safe_open
from safetensors.torch import save_file
from test_latent import of_two_sizes
from torch.nn.functional import cross_entropy
from transformers import (
    BatchEncoding,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from zoo import FAMILIES, build, inputs

import fastrot
from fastrot import Learned, Recipe, Rotation, RotationError
from fastrot.demo.corpus import heldout_files, read_bytes
from fastrot.demo.evaluate import MODEL, OUTLIER_SCALE
from fastrot.demo.outliers import with_outliers
from fastrot.lab.corpus import cut
from fastrot.lab.evaluate import Difference, Losses, compare, evaluate
from fastrot.lab.outliers import observed
from fastrot.lab.quantized import quantized
from fastrot.lab.schemes import Numbers, Scheme
from fastrot.learning import descents, learner
from fastrot.learning.capture import Sample, capture, drawn
from fastrot.learning.objective import Vectors, Weight, spread, total
from fastrot.learning.orthogonal import Walk, cayley, defect, descend, polished
from fastrot.learning.terms import LEFT_BY_GPTQ, bases, terms_of
from fastrot.learning.windows import JUDGES, parted, windows_in
from fastrot.verification import learned_positions

FAST = {"steps": 20, "refine": 0, "vectors": 64}
INT4 = Numbers()


def uneven(name="llama", **options):
    """A model whose stream has outliers, which a rotation can spread better or worse."""
    model = tiny(name, dtype=torch.float32, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] *= 20
    return model


@pytest.fixture(scope="module")
def model():
    return uneven()


@pytest.fixture(scope="module")
def text():
    return random_ids(uneven(), 16, 24, seed=3)


@pytest.fixture(scope="module")
def trained():
    """The embedded model, and Python code in bytes."""
    model = with_outliers(LlamaForCausalLM.from_pretrained(MODEL), scale=OUTLIER_SCALE).eval()
    stream = torch.tensor(read_bytes(heldout_files())).long()
    return model, cut(stream, 96, 96 * 96)


@pytest.fixture(scope="module")
def learned(trained):
    return fastrot.learn(*trained, scheme="w4a4kv4", steps=60, refine=0, vectors=512)


def test_descent_finds_a_rotation_and_stays_on_the_group():
    """The one that turns some vectors into others is known; Adam gets there to its last rate."""
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(12, 12, dtype=torch.float64, generator=generator) * 0.05
    target = cayley(skew - skew.mT)
    x = torch.randn(64, 12, generator=generator)
    y = x @ target.float()
    walk = Walk(12, 0.03)
    history = descend([walk], lambda qs: (x @ qs[0] - y).square().mean(), 200)
    q = polished(walk.q)
    assert q.dtype == torch.float64
    assert defect(q) <= 1e-14
    assert (q - target).abs().max() <= 1e-3
    assert history[-1] < 1e-5 < 1e-2 < history[0]


def test_several_matrices_walk_together():
    """As each does by itself: their parts of the loss do not meet."""
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))

    def loss(q, power):
        return (x @ q).abs().pow(power).sum(-1).mean()

    both = Walk(12, 0.03), Walk(12, 0.01)
    descend(both, lambda qs: loss(qs[0], 8) + loss(qs[1], 4), 20)
    for walk, power in zip(both, (8, 4), strict=True):
        alone = Walk(12, walk.rate)
        descend([alone], lambda qs, power=power: loss(qs[0], power), 20)
        torch.testing.assert_close(alone.q, walk.q, rtol=1e-6, atol=1e-6)


def test_ones_stay_where_they_are():
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))

    def loss(qs):
        return (x @ qs[0]).abs().pow(8).sum(-1).mean()

    walks = Walk(12, 0.03), Walk(12, 0.03, fixes_ones=True)
    for walk in walks:
        descend([walk], loss, 30)
    free, fixed = (walk.q for walk in walks)
    ones = torch.ones(12, dtype=torch.float64)
    assert (ones @ fixed - ones).abs().max() <= 1e-14
    assert (ones @ free - ones).abs().max() > 1e-3
    assert (fixed - torch.eye(12)).abs().max() > 1e-2


def test_polish():
    q = cayley(torch.triu(torch.ones(8, 8, dtype=torch.float64), 1) * 0.1)
    q = polished(torch.linalg.qr(q).Q + 1e-4)
    assert defect(q) <= 1e-14


def test_noise_costs_what_the_gradient_says(model, text):
    """Against autograd on zeros that are added at one site."""
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated)
    window = text[:1]
    kept = window.shape[1]
    found = capture(rotated, window, {"mlp", "values"}, kept, seed=4).samples
    generator = torch.Generator().manual_seed(4)
    added = torch.zeros(1, kept, 96, requires_grad=True)
    hook = rotated.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: (args[0] + added,))
    out = rotated(input_ids=window).logits[0]
    hook.remove()
    drawn = torch.multinomial(out.detach().softmax(-1), 1, generator=generator)[:, 0]
    (gradient,) = torch.autograd.grad(cross_entropy(out, drawn, reduction="sum"), added)
    energies = gradient.square().sum(-1).flatten() / kept
    order = energies.argsort()
    seen = {}
    with torch.no_grad(), observed(rotated, lambda site, layer, x: seen.update({(site, layer): x})):
        rotated(input_ids=window)
    vectors, shares = found["mlp", 1]
    mine = shares.argsort()
    torch.testing.assert_close(shares[mine], energies[order], rtol=1e-4, atol=0)
    torch.testing.assert_close(vectors[mine], seen["mlp", 1][0, order])
    values = seen["values", 0][0].flatten(0, -2)
    got = found["values", 0].vectors
    torch.testing.assert_close(got[got[:, 0].argsort()], values[values[:, 0].argsort()])
    assert set(found) == {(site, layer) for site in ("mlp", "values") for layer in (0, 1)}
    assert not any(p.grad is not None or not p.requires_grad for p in rotated.parameters())


def test_a_sample_estimates_all_and_misses_nothing_heavy():
    """One token that all others look at, and some that nobody does."""
    generator = torch.Generator().manual_seed(0)
    energies = torch.rand(300, generator=generator)
    energies[7], energies[:5] = 1000, 0
    values = torch.randn(300, generator=generator).square()
    sums, counts = [], []
    for _ in range(2000):
        rows, shares = drawn(energies, 40, generator)
        assert len(set(rows.tolist())) == 40
        assert 7 in rows
        assert shares[rows == 7] == pytest.approx(1000)
        others = rows != 7
        sums.append(float((shares * values[rows])[others].sum()))
        counts.append(float(shares[others].sum()))
    energies[7] = 0
    assert sum(sums) / 2000 == pytest.approx(float(energies @ values), rel=0.02)
    assert sum(counts) / 2000 == pytest.approx(float(energies.sum()), rel=0.02)


def test_all_are_drawn_if_there_is_room():
    energies = torch.tensor([0.0, 4.0, 1.0])
    rows, shares = drawn(energies, 5, torch.Generator().manual_seed(0))
    assert sorted(rows.tolist()) == [0, 1, 2]
    torch.testing.assert_close(shares, energies[rows])


def test_spread_is_the_variance_of_rounding():
    """Of flat vectors, whose 8-norm is known; groups see their own range."""
    x = torch.ones(3, 64)
    assert spread(x, INT4).tolist() == pytest.approx([64**0.25 / (12 * 7**2)] * 3)
    grouped = Numbers(per="group", group=16)
    x[:, :16] *= 5
    mean = (25 + 3) / 4
    assert spread(x, grouped).tolist() == pytest.approx([mean * 16**0.25 / (12 * 7**2)] * 3)
    asymmetric = Numbers(symmetric=False)
    ratio = spread(x, asymmetric) / spread(x, INT4)
    assert ratio.tolist() == pytest.approx([(7 / 7.5) ** 2] * 3)


@pytest.mark.parametrize("outputs", [False, True])
def test_a_weight_s_term_is_of_the_turned_weight(outputs):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 36, generator=generator)
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    whole = torch.block_diag(*[q] * (2 if outputs else 3))
    expected = 3.0 * spread(whole.T @ w if outputs else w @ whole, INT4).mean()
    got = Weight(w, 3.0, INT4, outputs).cost(q, generator, 0)
    torch.testing.assert_close(got, expected)


def test_gptq_leaves_a_part_of_the_weights_cost(model, text):
    rotated = copy.deepcopy(model)
    plan = fastrot.apply(rotated).plan
    captured = capture(rotated, text[:2], set(), 8, seed=0)
    nearest, gptq = (
        {
            place: [term.weight for term in terms]
            for place, terms in terms_of(rotated, plan, Scheme.parse(name), captured).items()
        }
        for name in ("w4a4", "w4gptq-a4")
    )
    assert nearest.keys() == gptq.keys() == {("R1", None), ("R2", 0), ("R2", 1)}
    for place, weights in nearest.items():
        assert gptq[place] == pytest.approx([LEFT_BY_GPTQ * weight for weight in weights])


def test_a_part_of_the_vectors_estimates_all():
    generator = torch.Generator().manual_seed(0)
    x, shares = torch.randn(20, 12, generator=generator), torch.rand(20, generator=generator)
    shares[3] = 50
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    exact = float(shares @ spread(x @ torch.block_diag(q, q), INT4)) / 2
    term = Vectors(Sample(x, shares), INT4)
    mean = sum(float(term.cost(q, generator, 5)) for _ in range(2000)) / 2000
    assert mean == pytest.approx(exact, rel=0.02)


def test_a_part_of_the_terms_estimates_all():
    generator = torch.Generator().manual_seed(0)
    samples = [Sample(torch.full((4, 8), float(i)), torch.ones(4)) for i in range(10)]
    terms = [Vectors(sample, INT4) for sample in samples]
    one = torch.eye(8)
    exact = total(terms, 4, 10, generator)([one])
    some = total(terms, 4, 3, generator)
    mean = sum(float(some([one])) for _ in range(2000)) / 2000
    assert mean == pytest.approx(float(exact), rel=0.05)


def test_learned_is_a_recipe_that_is_exact(trained, learned):
    model, text = trained
    assert learned.accepted, learned
    assert learned.gain.mean < 0
    assert learned.defect <= 1e-12
    layers = model.config.num_hidden_layers
    assert [len(learned.matrices[name]) for name in ("R1", "R2", "R3")] == [1, layers, layers]
    assert "R4" not in learned.matrices
    double, ids = copy.deepcopy(model).double(), text[:2]
    before = logits(double, ids)
    fastrot.apply(double, learned)
    assert relative_error(logits(double, ids), before) <= 1e-6
    assert isinstance(learned, Recipe)
    assert learned.scheme == "w4a4kv4"


def test_the_model_is_left_alone_and_runs_repeat(model, text):
    before, state = fingerprint(model), torch.random.get_rng_state()
    first = fastrot.learn(model, text, ("R1",), scheme="a4", seed=7, **FAST)
    assert difference(before, fingerprint(model)) == []
    assert torch.equal(state, torch.random.get_rng_state())
    again = fastrot.learn(model, text, ("R1",), scheme="a4", seed=7, **FAST)
    assert (first, first.history, first.gain) == (again, again.history, again.gain)
    other = fastrot.learn(model, text, ("R1",), scheme="a4", seed=8, **FAST)
    assert other.history != first.history


def test_the_gate(trained, monkeypatch):
    """Matrices that are made worse are not taken; the recipe is what it was."""
    monkeypatch.setattr(descents, "RATES", {"R1": -0.05})
    worse = fastrot.learn(*trained, ("R1", "R4"), scheme="a4", seed=1, **FAST)
    assert not worse.accepted
    assert worse.gain.mean > 0
    assert f"{worse.gain.mean:+.4f}" in str(worse)
    assert worse == Learned(("R1", "R4"), seed=1)
    assert "left" in str(worse)


def test_what_is_better_off_without_is_told(trained, learned, tmp_path):
    """The model is left as it is where rotations make the loss larger; both are measured anew."""
    assert not learned.is_harmful
    assert learned.unrotated.mean < 0
    model, text = copy.deepcopy(trained[0]).float(), trained[1]
    hurt = fastrot.learn(model, text, ("R1",), scheme="nvfp4", **FAST)
    windows, judges = parted(text)
    with quantized(model, "nvfp4", windows):
        plain = evaluate(model, judges)
    rotated = copy.deepcopy(model)
    fastrot.apply(rotated, hurt)
    with quantized(rotated, "nvfp4", windows):
        expected = compare(evaluate(rotated, judges), plain)
    assert hurt.unrotated.mean == pytest.approx(expected.mean, rel=1e-3)
    assert hurt.unrotated.error == pytest.approx(expected.error, rel=1e-3)
    path = tmp_path / "learned.safetensors"
    hurt.save(path)
    assert Learned.load(path).unrotated == hurt.unrotated


@pytest.mark.parametrize(
    ("mean", "error", "harmful"),
    [(0.3, 0.1, True), (0.3, 0.2, False), (-0.3, 0.1, False), (math.nan, math.nan, False)],
)
def test_advice_to_leave_a_model_unrotated(mean, error, harmful):
    learned = Learned(("R1",), scheme="nvfp4", before=3, unrotated=Difference(mean, error))
    assert learned.is_harmful == harmful
    assert ("0.3000 ± 0.1000 less: leave the model unrotated" in str(learned)) == harmful


def test_chance_is_seldom_taken_for_a_gain():
    """Of differences that are noise around zero 17 to 25 % gain one standard error by chance."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(2000, JUDGES, dtype=torch.float64, generator=generator)
    before = Losses(3 + torch.rand(JUDGES, dtype=torch.float64, generator=generator))
    taken = [learner._better(Losses(before.windows + each), before) for each in noise]
    assert 0.02 < sum(taken) / len(taken) < 0.06
    assert learner._better(Losses(before.windows - 0.2 + noise[0]), before)
    assert not learner._better(Losses(before.windows + 0.2 + noise[0]), before)


def test_what_is_finite_is_better_than_what_is_not():
    finite, broken = Losses(torch.ones(JUDGES)), Losses(torch.full((JUDGES,), math.nan))
    assert learner._better(finite, broken)
    assert not learner._better(broken, finite)


@pytest.mark.parametrize("count", [16, 17, 30, 32, 33, 100])
def test_a_quarter_is_held_out_or_eight_windows(count):
    windows = torch.arange(count * 3).view(count, 3)
    kept, judges = parted(windows)
    assert len(judges) == max(8, count // 4)
    assert torch.equal(torch.cat([kept, judges]).sort(0).values, windows)
    gaps = judges[:, 0].diff() // 3
    assert gaps.max() - gaps.min() <= 1


def test_what_is_learned_from_can_not_judge(model, text):
    other = random_ids(model, 8, 24, seed=4)
    for batches, heldout in (
        (text, text[:8]),
        (text, torch.cat([other, text[5:6]])),
        (torch.cat([text, text.flip(0)]), None),
    ):
        with pytest.raises(RotationError, match=r"held-out window \d \(.*\) is also learned from"):
            fastrot.learn(model, batches, ("R1",), heldout=heldout, **FAST)
    learned = fastrot.learn(model, text, ("R1",), heldout=other, **FAST | {"steps": 1})
    assert len(learned.history) == 1


def test_no_window_judges_twice(model, text):
    """Eight times the same would have a standard error of zero, and one window decide."""
    other = random_ids(model, 8, 24, seed=4)
    halves = parted(torch.arange(16 * 3).view(16, 3))
    held = halves[1][:, 0] // 3
    twice = text.clone()
    twice[held[3]] = twice[held[0]]
    for batches, heldout in (
        (text, other[:1].repeat(8, 1)),
        (text, torch.cat([other, other[2:3]])),
        (twice, None),
    ):
        with pytest.raises(RotationError, match=r"held-out window \d \(.*\) is also window \d, .*"):
            fastrot.learn(model, batches, ("R1",), heldout=heldout, **FAST)


@pytest.mark.parametrize("name", ["batches", "heldout"])
def test_padding_is_refused(name, model, text):
    mask = torch.ones_like(text)
    given = {"input_ids": text, "attention_mask": mask}
    assert torch.equal(windows_in(given, 64, None, "batches"), text)
    mask[3, -1] = 0
    padded = {"batches": text, name: given}
    with pytest.raises(RotationError, match=f"{name} has an attention_mask with zeros, .* cut it"):
        fastrot.learn(model, **padded, rotations=("R1",), **FAST)


@pytest.mark.parametrize("seed", [2**70 + 3, -1])
def test_whatever_a_recipe_takes_is_a_seed(seed, model, text):
    learned = fastrot.learn(model, text, ("R1",), seed=seed, **FAST | {"refine": 1})
    assert learned.seed == seed
    assert learned == fastrot.learn(model, text, ("R1",), seed=seed, **FAST | {"refine": 1})


def test_one_copy_of_the_model_at_a_time(model, text, monkeypatch):
    """Without waiting for a collection of cycles."""
    weights, alive = [], []
    rotate = learner.apply

    def counting(copied, recipe):
        alive.append(sum(weight() is not None for weight in weights))
        weights.extend(map(weakref.ref, copied.parameters()))
        return rotate(copied, recipe)

    monkeypatch.setattr(learner, "apply", counting)
    gc.disable()
    try:
        fastrot.learn(model, text, scheme="w4a4kv4", **FAST | {"steps": 1, "refine": 1})
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "bloom"])
def test_other_families(name, monkeypatch):
    """Behind LayerNorms the ones are fixed; Conv1D is transposed; some tokens are flattened."""
    monkeypatch.setattr(learner, "compare", lambda *_: Difference(-1.0, 0.0))
    family = FAMILIES[name]
    model = build(family, torch.float64)
    text = random_ids(model, 16, 16, seed=0)
    wanted = ("R1", "R2") if name == "bloom" else ("R1", "R2", "R3", "R4")
    learned = fastrot.learn(model, text, wanted, **FAST)
    (first,) = learned.matrices["R1"]
    assert (first.matrix() - Rotation("hadamard", first.size).matrix()).abs().max() > 1e-3
    given = inputs(family, model)
    with torch.no_grad():
        before = model(**given).logits
        fastrot.apply(model, learned)
        assert relative_error(model(**given).logits, before) <= 1e-6


def test_modules_that_text_does_not_reach():
    """Attention to images, without an image."""
    model = build(FAMILIES["mllama"], torch.float32)
    text = random_ids(model.model.language_model, 16, 16, seed=0)
    learned = fastrot.learn(model, text, ("R1", "R2"), scheme="w4a4", **FAST)
    assert learned.history


def test_a_tensor_with_two_readers_is_one_site():
    model = build(FAMILIES["gptj"], torch.float32)
    captured = capture(model, random_ids(model, 2, 12, seed=0), {"attention", "mlp"}, 8, seed=0)
    assert {site for site, _ in captured.samples} == {"attention"}


def test_another_default_dtype(model, text):
    expected = fastrot.learn(model, text, ("R1",), scheme="a4", **FAST)
    torch.set_default_dtype(torch.float64)
    try:
        learned = fastrot.learn(model, text, ("R1",), scheme="a4", **FAST)
    finally:
        torch.set_default_dtype(torch.float32)
    assert learned.history == pytest.approx(expected.history)


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_blocks(name, text):
    model = uneven(name)
    learned = fastrot.learn(
        model, text, ("R1", "R2"), scheme="w4g16a4g16", block_size=48, seed=2, **FAST
    )
    for given in (learned.matrices or {}).values():
        assert {matrix.size for matrix in given} <= {48, 16}
    fastrot.apply(model, learned)


def test_terms_are_those_that_a_scheme_rounds(model, text):
    rotated = copy.deepcopy(model)
    plan = fastrot.apply(rotated, ("R1", "R2", "R3", "R4")).plan
    assert {name: list(each) for name, each in bases(plan, rotated).items()} == {
        "R1": [None],
        "R2": [0, 1],
        "R3": [0, 1],
    }
    sites = {"attention", "mlp", "o", "values", "keys"}
    captured = capture(rotated, text[:2], sites, 8, seed=0)
    counts = {
        name: {key: len(each) for key, each in terms_of(rotated, plan, scheme, captured).items()}
        for name in ("w4", "a4", "kv4")
        for scheme in (Scheme.parse(name),)
    }
    assert counts["w4"] == {("R1", None): 14, ("R2", 0): 2, ("R2", 1): 2}
    assert counts["a4"] == {("R1", None): 4, ("R2", 0): 1, ("R2", 1): 1}
    assert counts["kv4"] == {
        **{("R2", layer): 1 for layer in (0, 1)},
        **{("R3", layer): 1 for layer in (0, 1)},
    }


def test_save_and_load(learned, tmp_path):
    path = tmp_path / "learned.safetensors"
    learned.save(path)
    again = Learned.load(path)
    assert again == learned
    assert vars(again).keys() == vars(learned).keys()
    assert (again.history, again.gain, again.text) == (learned.history, learned.gain, learned.text)
    empty = Learned(("R1",), precision="float64", scheme="a4")
    empty.save(path)
    assert Learned.load(path) == empty
    assert math.isnan(Learned.load(path).before)


def test_files_of_before_the_comparison_with_no_rotation(learned, tmp_path):
    path = tmp_path / "learned.safetensors"
    learned.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    described = json.loads(metadata["fastrot"])
    del described["unrotated"]
    save_file(tensors, path, metadata | {"fastrot": json.dumps(described)})
    assert Learned.load(path) == learned
    assert not Learned.load(path).is_harmful


def test_files_that_are_none(learned, tmp_path):
    path = tmp_path / "learned.safetensors"
    learned.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RotationError, match="no learned recipe"):
        Learned.load(path)
    save_file({"R1": torch.eye(4)}, path)
    with pytest.raises(RotationError, match="no learned recipe"):
        Learned.load(path)
    changed = learned.matrices["R1"][0].matrix()
    changed[0, 0] += 1e-9
    broken = copy.copy(learned)
    object.__setattr__(broken, "matrices", {"R1": (Fake(changed),)})
    broken.save(path)
    with pytest.raises(RotationError, match=r"R1.*orthogonal"):
        Learned.load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("before", "low", "before='low' is no number"),
        ("before", None, "before=None is no number"),
        ("defect", True, "defect=True is no number"),
        ("steps", 2.5, "steps=2.5 is no whole number"),
        ("scheme", 4, "scheme=4 is no text"),
        ("text", ["a"], r"text=\['a'\] is no text"),
        ("taken", "matrices", "taken='matrices' is no list of text"),
        ("taken", ["foo"], "taken={'foo'} is none of matrices, permutations"),
        ("taken", [1], r"taken=\[1\] is no list of text"),
        ("history", {"0": 1.0}, "history=.* is no list of number"),
        ("gain", ["a", 0.0], "gain=.* is no list of number"),
        ("gain", [0.0], "error"),
        ("unrotated", ["a", 0.0], "unrotated=.* is no list of number"),
        ("rotations", 1, "not iterable"),
    ],
)
def test_values_of_the_wrong_type(name, value, message, tmp_path):
    path = tmp_path / "learned.safetensors"
    Learned(("R1",), scheme="a4", before=1, history=(0.5, 0.25), taken=("matrices",)).save(path)
    assert str(Learned.load(path)).startswith("a4: loss 1.0000")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described = json.dumps(json.loads(metadata["fastrot"]) | {name: value})
    save_file({"none": torch.zeros(0)}, path, metadata | {"fastrot": described})
    with pytest.raises(RotationError, match=f"{re.escape(str(path))}: .*{message}"):
        Learned.load(path)


def test_a_file_that_can_not_be_written(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory: .*/missing/R\.safetensors"):
        Learned(("R1",)).save(tmp_path / "missing" / "R.safetensors")


def test_saving_that_is_stopped_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "R.safetensors"
    Learned(("R1",), seed=3).save(path)
    write = Path.write_bytes

    def stopped(self, whole):
        write(self, whole[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        Learned(("R1",), seed=4).save(path)
    assert Learned.load(path).seed == 3
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_reads_other_files_reads_a_learned_one(tmp_path):
    """safetensors' own files are private, whatever the umask says."""
    other = tmp_path / "other"
    other.write_bytes(b"")
    Learned(("R1",)).save(tmp_path / "R.safetensors")
    assert (tmp_path / "R.safetensors").stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("name", ["R", "part"])
def test_a_file_that_can_not_be_read_is_not_called_missing(
    name, model, text, tmp_path, monkeypatch
):
    path = tmp_path / name
    Learned(("R1",)).save(path)
    opened = Path.open

    def refused(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match=name):
        if name == "R":
            Learned.load(path)
        fastrot.learn(model, text, ("R1",), keep=path, **FAST)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("R2", "R2.0", "R2.1"), "R2 is given of '', '0', '1', not of each layer"),
        (("R2.0", "R2.2"), "R2 is given of '0', '2', not of each layer"),
        (("R2.1", "R2.x"), "R2 is given of '1', 'x', not of each layer"),
    ],
)
def test_layers_that_are_left_out_of_a_file(names, message, tmp_path):
    path = tmp_path / "R.safetensors"
    Learned(("R1", "R2")).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: torch.eye(4, dtype=torch.float64) for name in names}, path, metadata)
    with pytest.raises(RotationError, match=re.escape(f"{path}: {message}")):
        Learned.load(path)


@pytest.mark.parametrize("name", ["seed", "steps", "gain", "precision"])
def test_values_that_a_file_lacks(name, learned, tmp_path):
    path = tmp_path / "R.safetensors"
    learned.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["fastrot"])
    del described[name]
    save_file({"none": torch.zeros(0)}, path, metadata | {"fastrot": json.dumps(described)})
    with pytest.raises(RotationError, match=f"it lacks {name}"):
        Learned.load(path)


class Fake:
    def __init__(self, matrix):
        self.operand = matrix


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotations": ("R4",)}, "none can be learned"),
        ({"rotations": ("R3",), "scheme": "w4a4"}, "none can be learned"),
        ({"rotations": ("R1",), "scheme": "kv4"}, "none can be learned"),
        ({"rotations": ("R1",), "matrices": {"R1": torch.eye(96)}}, "matrices already"),
        ({"scheme": "w5x"}, "w5x"),
        ({"batches": torch.zeros(3, 8, dtype=torch.long)}, "too few"),
        ({"batches": [torch.zeros(2, 8, dtype=torch.long), torch.zeros(9).long()]}, "lengths"),
        *(
            ({"batches": empty}, "batches is empty, or")
            for empty in ([], *(torch.zeros(n, dtype=torch.long) for n in (0, (4, 0), (0, 8))))
        ),
        ({"batches": {"ids": torch.zeros(4, 8)}}, "a dict of ids; it must have input_ids"),
        ({"batches": torch.full((16, 8), 64)}, "batches has the token id 64, .* 0 to 63"),
        (
            {"batches": torch.arange(15 * 4).view(15, 4)},
            "15 windows are too few .* give 16 or more",
        ),
        ({"heldout": torch.arange(7 * 4).view(7, 4)}, "7 windows in heldout .* give 8 or more"),
        ({"heldout": -torch.ones(8, 8).long()}, "heldout has the token id -1, .* 0 to 63"),
        ({"rotations": ("R1",), "block_size": 7}, "7"),
    ],
)
def test_refusals(model, text, arguments, message):
    before = fingerprint(model)
    with pytest.raises(RotationError, match=message):
        fastrot.learn(model, **{"batches": text, **arguments}, **FAST)
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_models_that_predict_no_tokens(kind, text):
    model = kind(tiny("llama").config).eval()
    with pytest.raises(RotationError, match=f"{kind.__name__} has no language-model head"):
        fastrot.learn(model, text, ("R1",), **FAST)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_windows_longer_than_a_table_of_positions(name):
    model = build(FAMILIES[name], torch.float32)
    most = model.config.max_position_embeddings
    windows = random_ids(model, 16, most + 1, seed=0)
    before = fingerprint(model)
    with pytest.raises(RotationError, match=f"{most + 1} tokens, and the model has {most} positio"):
        fastrot.learn(model, windows, ("R1",), **FAST)
    assert difference(before, fingerprint(model)) == []
    assert learned_positions(model) == most
    assert learned_positions(uneven()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": [torch.zeros(2, 8)]}, r"token ids, .* got \(2, 8\) of float32"),
        ({"batches": torch.zeros(16, 8, dtype=torch.bool)}, r"got \(16, 8\) of bool"),
        ({"batches": {"input_ids": [[3, 4, 5]]}}, "token ids, .* got list"),
        ({"batches": 3}, "token ids, .* got int"),
        ({"scheme": None}, "scheme must be .* got None"),
        ({"scheme": 4}, "scheme must be .* got 4"),
    ],
)
def test_wrong_types(model, text, arguments, message):
    with pytest.raises(TypeError, match=message):
        fastrot.learn(model, **{"batches": text, **arguments}, **FAST)


@pytest.mark.parametrize(
    "given",
    [lambda x: {"input_ids": x}, lambda x: BatchEncoding({"input_ids": x}), list, lambda x: [x]],
)
def test_whatever_holds_token_ids(text, given):
    assert torch.equal(windows_in(given(text), 64, None, "batches"), text)


def test_the_code_in_the_document_runs(capsys):
    text = (Path(__file__).parent.parent / "docs" / "learning.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("w4a4kv4: loss ")


@pytest.mark.parametrize(
    ("make", "rotation", "message"),
    [
        (
            lambda: of_two_sizes(torch.float32),
            "R3",
            r"orders by layers are 28 in 0 and 20 in 1; give block_size={'R3': 4}, .* out",
        ),
        *(
            (
                lambda: build(FAMILIES["gemma4_text"], torch.float32),
                name,
                "16 in 0, 2 and 24 in 1, 3",
            )
            for name in ("R2", "R3")
        ),
    ],
)
def test_sizes_that_differ_between_layers_are_refused_before_anything_runs(
    make, rotation, message, monkeypatch
):
    model = make()
    before = fingerprint(model)
    monkeypatch.setattr(descents, "capture", lambda *_: pytest.fail("it was too late"))
    with pytest.raises(RotationError, match=message) as caught:
        fastrot.learn(model, torch.randint(3, 51, (16, 6)), rotation, **FAST)
    assert f"{rotation} can't be learned" in str(caught.value)
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", ["R2", "R3"])
def test_layers_that_share_keys_and_values_learn_one(name, monkeypatch):
    """There is one for each layer that makes keys; all that use these count, and stay exact."""
    model = build(FAMILIES["gemma4_shared"], torch.float32)
    ids = random_ids(model, 16, 12, seed=0)
    monkeypatch.setattr(learner, "_better", lambda *_: True)
    learned = fastrot.learn(model, ids, name, block_size={name: 8}, **FAST | {"refine": 2})
    assert len(learned.matrices[name]) == 2
    rotated = copy.deepcopy(model).double()
    before = logits(rotated, ids)
    fastrot.apply(rotated, learned, undo="none")
    assert relative_error(logits(rotated, ids), before) <= 1e-6


def test_the_output_projection_of_who_borrows_is_a_term_of_the_lender():
    model = build(FAMILIES["gemma4_shared"], torch.float32)
    plan = fastrot.apply(model, "R2", block_size={"R2": 8}).plan
    captured = capture(model, random_ids(model, 2, 12, seed=0), {"o"}, 8, 0)
    terms = terms_of(model, plan, Scheme.parse("w4a4"), captured)
    assert {place: len(each) for place, each in terms.items()} == {("R2", 0): 5, ("R2", 1): 5}
