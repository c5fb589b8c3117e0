"""What is quantized, and how: weights, activations, keys and values; names such as ``w4a4kv4``."""

import re
from dataclasses import dataclass
from typing import Literal

from fastrot.errors import RotationError
from fastrot.kernels.formats import FORMATS

FLOATS = ("fp8", "mxfp4", "nvfp4")
BITS = range(2, 17)
CACHED = ("keys", "values", "latents", "positions")
"""Places in the cache, two of them in a model; the last two are those of latent attention."""

_PART = re.compile(rf"(kv|w|a)(\d+|{'|'.join(FLOATS)})(?:g(\d+)|(t))?(asym|sym)?(mse)?(gptq)?")


@dataclass(frozen=True)
class Numbers:
    """How the numbers of one kind of tensor are rounded.

    Attributes:
        format: ``int``, ``fp8`` (e4m3), ``mxfp4`` or ``nvfp4``.
        bits: of integers; the other formats have their own, and None here.
        per: what shares a scale: a ``vector`` along the last dimension (an output channel of a
            weight, a token of activations, a token and head of keys and values), a ``group`` of
            consecutive elements in it, or the whole ``tensor``.
        group: the size of a group; mxfp4 and nvfp4 have theirs.
        symmetric: levels lie around zero; otherwise they span the range from least to greatest.
        clip: integers only: levels reach the greatest magnitude (``max``), or as far as makes the
            squared error least (``mse``).
        gptq: weights in integers only: every error is made up for by what is rounded after it, see
            :mod:`fastrot.lab.gptq`; needs text to calibrate on.

    Raises:
        RotationError: a value that does not exist, or that does not go with the format.
    """

    format: str = "int"
    bits: int | None = 4
    per: Literal["vector", "group", "tensor"] = "vector"
    group: int | None = None
    symmetric: bool = True
    clip: Literal["max", "mse"] = "max"
    gptq: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("int", *FLOATS):
            raise RotationError(f"format={self.format!r} is not one of int, {', '.join(FLOATS)}")
        if self.per not in ("vector", "group", "tensor"):
            raise RotationError(f"per={self.per!r} is not one of vector, group, tensor")
        if self.clip not in ("max", "mse"):
            raise RotationError(f"clip={self.clip!r} is not one of max, mse")
        if (self.group is not None) != (self.per == "group"):
            raise RotationError(f"group={self.group} with per={self.per!r}: give both or none")
        if self.group is not None and self.group < 2:
            raise RotationError(f"group={self.group} is not a size above 1")
        if self.gptq and self.per == "tensor":
            raise RotationError("gptq=True with per='tensor': it takes a scale a row, or a group")
        if self.format == "int":
            if self.bits not in BITS:
                raise RotationError(f"bits={self.bits} is not from {BITS[0]} to {BITS[-1]}")
        elif self.bits is not None or not self.symmetric or self.clip != "max" or self.gptq:
            raise RotationError(
                f"bits={self.bits}, symmetric={self.symmetric}, clip={self.clip!r}, "
                f"gptq={self.gptq}: {self.format} is symmetric, its bits are fixed, and it is "
                "rounded to nearest without clipping; leave these out"
            )
        elif self.group != FORMATS[self.format].group and self.format != "fp8":
            raise RotationError(
                f"group={self.group}: {self.format} has groups of {FORMATS[self.format].group}"
            )
        elif self.group is not None and self.group % 2:
            raise RotationError(f"group={self.group}: {self.format} has groups of an even size")

    @classmethod
    def of(cls, format: str) -> "Numbers":
        """The usual numbers of a format other than integers."""
        group = FORMATS[format].group
        return cls(format, None, "group" if group else "vector", group)

    def text(self, kind: str) -> str:
        """As in the name of a scheme, for ``kind`` w, a or kv."""
        parts = [kind, self.format if self.bits is None else str(self.bits)]
        if self.bits is not None or self.format == "fp8":
            parts.append({"vector": "", "tensor": "t", "group": f"g{self.group}"}[self.per])
        if self.bits is not None and self.symmetric != (kind != "kv"):
            parts.append("sym" if self.symmetric else "asym")
        parts.append("mse" if self.clip == "mse" else "")
        return "".join(parts) + ("gptq" if self.gptq else "")


@dataclass(frozen=True)
class Scheme:
    """What is quantized in every decoder layer; None stays as it is.

    Attributes:
        weights: of the linear modules.
        activations: their inputs.
        kv: keys, after RoPE and R3, and values, as they enter the cache.
    """

    weights: Numbers | None = None
    activations: Numbers | None = None
    kv: Numbers | None = None

    def __post_init__(self) -> None:
        if any(numbers is not None and numbers.gptq for numbers in (self.activations, self.kv)):
            raise RotationError("gptq is for weights, not for activations, keys or values")

    def __str__(self) -> str:
        kinds = {"w": self.weights, "a": self.activations, "kv": self.kv}
        texts = [numbers.text(kind) for kind, numbers in kinds.items() if numbers is not None]
        for name in FLOATS:
            if texts == [f"w{name}", f"a{name}"]:
                return name
        return ("" if all(re.fullmatch(r"(w|a|kv)\d+", t) for t in texts) else "-").join(texts)

    def at(self, place: str) -> Numbers | None:
        """How numbers are rounded at one of :data:`fastrot.lab.predict.PLACES`; None: not."""
        if place == "weights":
            return self.weights
        return self.kv if place in CACHED else self.activations

    @classmethod
    def parse(cls, text: "str | Scheme") -> "Scheme":
        """The scheme of a name, in any letter case; parts may be joined by ``-``.

        Args:
            text: ``fp8``, ``mxfp4`` or ``nvfp4`` (weights and activations); or some of ``w``, ``a``
                and ``kv``, each with its bits or format, then ``g`` and a group size or ``t`` for
                one scale per tensor, ``sym`` or ``asym`` (keys and values are asymmetric by
                default), ``mse`` for clipping, ``gptq`` (weights): ``w4a4kv4``, ``w4g128gptq-a8``.

        Raises:
            RotationError: no such scheme.
            TypeError: neither a name nor a scheme.
        """
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a scheme is a name or a Scheme, got {text!r}")
        wanted = text.lower()
        if wanted in FLOATS:
            return cls(Numbers.of(wanted), Numbers.of(wanted))
        found: dict[str, Numbers] = {}
        rest = wanted
        while match := _PART.match(rest):
            kind = match[1]
            if kind in found:
                break
            found[kind] = _numbers(text, match)
            rest = rest[match.end() :]
            rest = rest[1:] if rest[:1] == "-" and len(rest) > 1 else rest
        if rest or not found:
            raise RotationError(
                f"scheme {text!r} is unknown; there are {', '.join(FLOATS)}, and any of w, a and "
                f"kv once, each with {BITS[0]} to {BITS[-1]} bits or one of these formats, then g "
                "and a group size or t (per tensor), sym or asym, mse, gptq: w4a4kv4, w4g128mse-a8"
            )
        try:
            return cls(found.get("w"), found.get("a"), found.get("kv"))
        except RotationError as error:
            raise RotationError(f"scheme {text!r}: {error}") from None


def _numbers(text: str, match: re.Match[str]) -> Numbers:
    kind, value, group, tensor, symmetry, mse, gptq = match.groups()
    try:
        if value in FLOATS:
            usual = Numbers.of(value)
            wrong = symmetry or mse or gptq
            if wrong or ((group or tensor) and value != "fp8"):
                raise RotationError(f"{value} takes no {wrong or tensor or 'g' + group}")
            if not (group or tensor):
                return usual
        return Numbers(
            value if value in FLOATS else "int",
            None if value in FLOATS else int(value),
            "group" if group else "tensor" if tensor else "vector",
            int(group) if group else None,
            symmetry == "sym" if symmetry else value in FLOATS or kind != "kv",
            "mse" if mse else "max",
            gptq is not None,
        )
    except RotationError as error:
        raise RotationError(f"scheme {text!r}, {match[0]}: {error}") from None
