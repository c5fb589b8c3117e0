"""Measures what rotations do to the demo model: exactness, and perplexity after quantization."""

import copy
import math
import platform
import textwrap
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

import fastrot
from fastrot.demo.corpus import heldout_files, read_bytes, training_files
from fastrot.demo.outliers import with_outliers
from fastrot.lab.corpus import cut
from fastrot.lab.evaluate import BATCH, evaluate
from fastrot.lab.quantized import quantized
from fastrot.lab.report import recommend
from fastrot.lab.schemes import Scheme

MODEL = Path(__file__).with_name("model")
ALL = ("R1", "R2", "R3", "R4")
CASES = (((), None), ((), 4), (("R1", "R2"), 4), (ALL, 4))
"""Rotations, and the bits of everything; None is float32. Last comes learned R1 to R3."""
SCHEME = "w4a4kv4"
LEARN_FROM = 32
"""Windows of text that training read."""

CONTEXT = 512
OUTLIER_SCALE = 16
COLUMNS = (
    "model",
    "rotations",
    "numbers",
    "perplexity",
    "bits/byte",
    "max logit error",
    "relative",
    "rotated in",
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model: which copy.
        rotations: those on it.
        learned: whether R1 to R3 are :func:`fastrot.learn`'s.
        bits: of weights, activations, keys and values; None is float32.
        perplexity: per byte of held-out text.
        bits_per_byte: its logarithm to base 2.
        max_error: greatest difference between the float32 logits before quantization and those of
            the model as trained.
        relative_error: norm of the difference over the norm of the logits.
        seconds: what the rotation took, if there is one, and learning it.
    """

    model: str
    rotations: tuple[str, ...]
    learned: bool
    bits: int | None
    perplexity: float
    bits_per_byte: float
    max_error: float
    relative_error: float
    seconds: float | None


@dataclass(frozen=True)
class Report:
    """All measurements of a run, what follows, and what they depend on."""

    rows: tuple[Row, ...]
    recommended: dict[str, str | None]
    transform_type: str
    evaluated_bytes: int
    python: str
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def run(
    folder: Path = MODEL,
    *,
    transform_type: str = "hadamard",
    seed: int = 0,
    nbytes: int = 65536,
    steps: int = 300,
    progress: bool = False,
) -> Report:
    """Evaluate a byte-level Llama and its copy with outliers, quantized with and without rotations.

    Args:
        folder: the model; loaded in float32.
        transform_type: kind of all rotations.
        seed: of random rotations and of the choice of outlier channels.
        nbytes: length of the held-out text, in windows spread evenly over all of it.
        steps: of learning.
        progress: show a bar.

    Raises:
        FileNotFoundError: the standard library's source is not installed.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = heldout_windows(nbytes)
    probe = windows[:BATCH, :-1]
    expected = logits_of(model, probe)
    copies = {
        "as trained": model,
        "with outliers": with_outliers(model, scale=OUTLIER_SCALE, seed=seed),
    }
    rotate = partial(fastrot.apply, transform_type=transform_type, seed=seed)
    # The first rotation of a process compiles kernels, which is not what is to be timed.
    rotate(copy.deepcopy(model), CASES[-1][0])
    evaluated = windows[:, 1:].numel()
    cases = [(*case, False) for case in CASES] + [(*CASES[-1], True)]
    rows, recommended = [], {}
    total = len(copies) * len(cases) * evaluated
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, original in copies.items():
            losses = {}
            for rotations, bits, learned in cases:
                label = _rotations(rotations, learned)
                bar.set_description(f"{name}, {label}")
                case = copy.deepcopy(original)
                began = time.perf_counter()
                if learned:
                    fastrot.apply(case, _learned(case, transform_type, seed, steps))
                elif rotations:
                    rotate(case, rotations)
                seconds = time.perf_counter() - began if rotations else None
                errors = logit_errors(logits_of(case, probe), expected)
                with quantized(case, Scheme() if bits is None else SCHEME):
                    found = evaluate(case, windows, bar.update)
                if bits is not None:
                    losses[label] = found
                numbers = (found.perplexity, found.mean / math.log(2), *errors, seconds)
                rows.append(Row(name, rotations, learned, bits, *numbers))
            if len(windows) > 1:
                recommended[name] = recommend(SCHEME, losses).rotations
    versions = (platform.python_version(), torch.__version__)
    return Report(tuple(rows), recommended, transform_type, evaluated, *versions)


def _learned(model: Any, transform_type: str, seed: int, steps: int) -> fastrot.Recipe:
    stream = torch.tensor(read_bytes(training_files())).long()
    windows = cut(stream, CONTEXT, LEARN_FROM * CONTEXT)
    recipe = fastrot.Recipe(ALL, transform_type, seed=seed)
    return fastrot.learn(model, windows, recipe, scheme=SCHEME, steps=steps, refine=0)


def heldout_windows(nbytes: int, context: int = CONTEXT) -> Tensor:
    """Held-out text, ``(n, context + 1)`` int64: each window ends with the byte after it."""
    return cut(torch.tensor(read_bytes(heldout_files())).long(), context, nbytes)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits ``(batch, length, vocabulary)`` of token ids ``(batch, length)``."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def logit_errors(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Greatest difference, and norm of the difference over the norm of ``expected``."""
    difference = logits.double() - expected.double()
    return float(difference.abs().max()), float(difference.norm() / expected.double().norm())


def table(report: Report) -> str:
    """A report as text for a terminal."""
    cells = [COLUMNS, *map(_cells, report.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    rule = "-" * max(map(len, lines))
    middle = 1 + len(report.rows) // 2
    body = [lines[0], rule, *lines[1:middle], rule, *lines[middle:], ""]
    verdicts = [
        f"recommended for {SCHEME.upper()}, {name}: {best}"
        for name, best in report.recommended.items()
    ]
    return "\n".join([*body, *verdicts, *([""] if verdicts else []), _notes(report)])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        _rotations(row.rotations, row.learned),
        "float32" if row.bits is None else f"W{row.bits}A{row.bits}KV{row.bits}",
        f"{row.perplexity:.3f}",
        f"{row.bits_per_byte:.3f}",
        f"{row.max_error:.1e}",
        f"{row.relative_error:.1e}",
        "" if row.seconds is None else f"{1000 * row.seconds:.0f} ms",
    )


def _rotations(names: tuple[str, ...], learned: bool) -> str:
    return "R1-R4 learned" if learned else " ".join(names) or "none"


def _notes(report: Report) -> str:
    notes = (
        f"Perplexity per byte on {report.evaluated_bytes:,} bytes of modules of Python "
        f"{report.python} that training did not read; torch {report.torch}, "
        f"{report.transform_type} rotations.",
        "Logit errors: of the float32 model, before it is quantized, against the one as trained.",
        "W4A4KV4: simulated round to nearest without calibration; weights per output channel, "
        "activations per token, keys and values per token and head.",
        "Learned: R1 to R3, fitted to text that training read; that takes the time.",
        "Recommended: the fewest rotations whose loss is not clearly above the least.",
        "With outliers: functionally identical to the model as trained. In every layer a few "
        f"channels are multiplied by {OUTLIER_SCALE} where they are written (norms, up, value and "
        f"key projections) and divided by {OUTLIER_SCALE} where they are read, which changes no "
        "bit of the logits. R1 folds the norms and so takes their share back; the other channels "
        "stay, and rotations spread them.",
    )
    return "\n".join(textwrap.fill(note, 98, subsequent_indent="  ") for note in notes)
