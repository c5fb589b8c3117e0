"""Every argument and every field of one, with values that it can't take: refused by name."""

import math
from collections import Counter
from dataclasses import asdict, fields

import pytest
import torch
from helpers import difference, fingerprint, tiny

import fastrot
from fastrot.mapping import ARCHITECTURES, Mapping, NormMapping
from fastrot.transform_config import TransformArgs, TransformScheme


class Odd:
    """An object that is nothing fastrot knows."""


VALUES = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": math.nan,
    "10**30": 10**30,
    "''": "",
    "'x'": "x",
    "'re:('": "re:(",
    "b'x'": b"x",
    "[]": [],
    "{}": {},
    "[None]": [None],
    "[7]": [7],
    "{'x': 7}": {"x": 7},
    "Odd": Odd(),
    "tensor": torch.zeros(2),
    "dtype": torch.float16,
    "function": len,
}
NOTHING = {"[]", "{}"}
WORDS = {"''", "'x'", "{'x': 7}"} | NOTHING
FINE = {
    "argument": {
        "randomize": {"True"},
        "block_size": {"None", "{}"},
        "seed": {"-1", "0", "10**30"},
        "precision": {"None"},
        "matrices": {"None", "{}"},
        "mappings": {"None"},
        "norm_mappings": {"None"},
        "transform_config": {"None"},
        "trust": {"True"},
        "progress": {"True"},
    },
    "mapping": {
        "attn_head_dim": {"None"},
        "ignore": NOTHING,
        "attn_gated": {"True"},
        "readers": NOTHING,
        "writers": NOTHING,
        "latent_writers": NOTHING,
        "latent_readers": NOTHING,
        "post_norm": NOTHING,
        "post_norm_in": WORDS,  # a pattern may match nothing
        "transposed": WORDS,
        "between": NOTHING,
        "throughout": NOTHING,
    },
    "norm": {"offset": {"0"}},
    "scheme": {
        "randomize": {"True"},
        "head_dim": {"None"},
        "fixes_ones": {"True"},
        "matrices": NOTHING,
    },
    "place": {"inverse": {"True"}, "ignore": WORDS},
    "config": {},
}
"""What a field does take."""

ROW = ARCHITECTURES["llama"]
ROLES = asdict(ROW.mapping)
FIRST, *NORMS = (asdict(norm) for norm in ROW.norms)
DOWN = {"targets": [r"re:.*down_proj$"], "location": "input"}
SCHEME = {"type": "hadamard", "apply": [DOWN, DOWN | {"location": "weight_input"}]}


def configured(scheme):
    return {"transform_config": {"config_groups": {"R4": scheme}}}


ARGUMENTS = (
    *("rotations", "transform_type", "randomize", "block_size", "seed", "precision", "mappings"),
    *("matrices", "norm_mappings", "transform_config", "trust", "undo", "progress"),
)
KINDS = {
    "argument": (ARGUMENTS, lambda change: change),
    "mapping": (Mapping, lambda change: {"mappings": ROLES | change}),
    "norm": (NormMapping, lambda change: {"norm_mappings": [FIRST | change, *NORMS]}),
    "scheme": (TransformScheme, lambda change: configured(SCHEME | change)),
    "place": (TransformArgs, lambda change: configured(SCHEME | {"apply": [DOWN | change]})),
    "config": (("config_groups",), lambda change: {"transform_config": change}),
}
"""The fields of a kind, and the arguments in which one is changed."""

BAD = [
    (kind, field, word)
    for kind, (names, _) in KINDS.items()
    for field in (names if isinstance(names, tuple) else [f.name for f in fields(names)])
    for word in VALUES
    if word not in FINE[kind].get(field, ())
]


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate": 12}
    return tiny("llama", layers=1, vocab=16, **sizes)


@pytest.fixture(scope="module")
def before(model):
    return fingerprint(model)


def named(field, value, message):
    """The field, the value or a part of it; of an empty one, what is left without."""
    words = [field, repr(value)]
    if isinstance(value, (list, dict)) and not value:
        words += ["model.layers.0", "LlamaForCausalLM", "R4"]
    elif isinstance(value, (list, dict, bytes, torch.Tensor)):
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        words += map(repr, parts)
    return any(word in message for word in words)


@pytest.mark.parametrize(("kind", "field", "word"), BAD)
def test_refused_by_name_and_untouched(kind, field, word, model, before):
    value = VALUES[word]
    with pytest.raises((fastrot.RotationError, TypeError)) as caught:
        fastrot.apply(model, **KINDS[kind][1]({field: value}))
    assert named(field, value, str(caught.value)), caught.value
    assert difference(before, fingerprint(model)) == []


def test_there_are_hundreds():
    counts = Counter(kind for kind, _, _ in BAD)
    assert counts.total() == len(set(BAD)) >= 500
    assert counts.keys() == KINDS.keys()
    assert min(counts.values()) >= 20
