"""Names of schemes: what they mean, and what is refused."""

from itertools import product

import pytest

from fastrot import RotationError
from fastrot.lab.schemes import Numbers, Scheme

INT4, INT8 = Numbers(bits=4), Numbers(bits=8)
KV4 = Numbers(bits=4, symmetric=False)
MEANINGS = {
    "w4a4kv4": Scheme(INT4, INT4, KV4),
    "a4kv4": Scheme(None, INT4, KV4),
    "w8a8": Scheme(INT8, INT8),
    "w4": Scheme(INT4),
    "mxfp4": Scheme(Numbers("mxfp4", None, "group", 32), Numbers("mxfp4", None, "group", 32)),
    "nvfp4": Scheme(Numbers("nvfp4", None, "group", 16), Numbers("nvfp4", None, "group", 16)),
    "fp8": Scheme(Numbers("fp8", None), Numbers("fp8", None)),
    "w4g128mse-a8t": Scheme(
        Numbers("int", 4, "group", 128, clip="mse"), Numbers("int", 8, "tensor")
    ),
    "w4asym-a8asym-kv4sym": Scheme(KV4, Numbers(bits=8, symmetric=False), INT4),
    "wmxfp4-afp8-kvfp8": Scheme(Numbers.of("mxfp4"), Numbers.of("fp8"), Numbers.of("fp8")),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_what_names_mean(text):
    scheme = MEANINGS[text]
    assert Scheme.parse(text) == Scheme.parse(text.upper()) == Scheme.parse(scheme) == scheme
    assert str(scheme) == text


def test_every_scheme_has_a_name_of_its_own():
    shares = [("vector", None), ("group", 32), ("tensor", None)]
    integers = [
        Numbers("int", bits, per, group, symmetric, clip)
        for bits, (per, group), symmetric, clip in product(
            (3, 16), shares, (True, False), ("max", "mse")
        )
    ]
    floats = [Numbers("fp8", None, *share) for share in shares]
    every = [None, *integers, *floats, Numbers.of("mxfp4"), Numbers.of("nvfp4")]
    schemes = [Scheme(*three) for three in product(every[::3], every, every[::2])][1:]
    names = {str(scheme): scheme for scheme in schemes}
    assert len(names) == len(schemes)
    for name, scheme in names.items():
        assert Scheme.parse(name) == scheme


@pytest.mark.parametrize(
    "text", ["", "w", "w4x", "4", "int4", "w4w4", "w4a4kv4-", "-w4", "mxfp4a4", "w4 a4", "w4mseg32"]
)
def test_unknown_names_are_refused_with_those_that_exist(text):
    with pytest.raises(RotationError, match="is unknown; there are fp8, mxfp4, nvfp4, and any of"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w1", "w1: bits=1 is not from 2 to 16"),
        ("w4a17", "a17: bits=17"),
        ("w4g1", "group=1 is not a size above 1"),
        ("wmxfp4g64", "mxfp4 takes no g64"),
        ("wnvfp4t", "nvfp4 takes no t"),
        ("wfp8g3", "wfp8g3: group=3: fp8 has groups of an even size"),
        ("afp8mse", "fp8 takes no mse"),
        ("afp8asym", "fp8 takes no asym"),
    ],
)
def test_values_that_do_not_exist_are_refused(text, message):
    with pytest.raises(RotationError, match=message):
        Scheme.parse(text)


@pytest.mark.parametrize("scheme", [None, 4, b"w4", Numbers()])
def test_what_is_no_name_is_refused(scheme):
    with pytest.raises(TypeError, match="a scheme is a name or a Scheme, got "):
        Scheme.parse(scheme)


@pytest.mark.parametrize(
    "arguments",
    [
        {"format": "int3"},
        {"per": "token"},
        {"clip": "min"},
        {"per": "group"},
        {"group": 32},
        {"bits": None},
        {"format": "fp8"},
        {"format": "fp8", "bits": None, "symmetric": False},
        {"format": "mxfp4", "bits": None},
        {"format": "fp8", "bits": None, "per": "group", "group": 33},
        {"format": "nvfp4", "bits": None, "per": "group", "group": 32},
    ],
)
def test_numbers_that_contradict_themselves_are_refused(arguments):
    with pytest.raises(RotationError):
        Numbers(**arguments)
