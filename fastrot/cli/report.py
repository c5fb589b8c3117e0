"""The command ``report``."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrot.cli.output import announce
from fastrot.cli.texts import CONTEXT, spread, windows_of
from fastrot.lab.sets import in_order
from fastrot.learning.kept import beside

CALIBRATION = 32
"""Windows that GPTQ sees, at most."""
EMBEDDED = "demo"
"""Names the model in this package, with the outlier channels that it is given in the demo."""


def report(args: Namespace) -> int:
    """Measure a model with rotations and schemes, and write what follows as a page."""
    from fastrot.lab.page import sentence, write
    from fastrot.lab.plots import check_plots
    from fastrot.lab.report import FEWEST, measure
    from fastrot.lab.schemes import Scheme

    check_plots()
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"{args.out} is a file; give a folder")
    schemes = [str(Scheme.parse(name)) for name in args.scheme]
    asks = any((weights := Scheme.parse(s).weights) and weights.gptq for s in schemes)
    # Of twice as many windows every other one is for GPTQ.
    tokens = args.tokens * 2 if asks else args.tokens
    make = _embedded if args.model == EMBEDDED else _checkpoint
    load, windows = make(args, tokens, FEWEST * 2 if asks else FEWEST)
    calibration = windows[1::2][:CALIBRATION] if asks else None
    texts = ", ".join(path.name for path in args.text)
    found = "held-out Python modules" if args.model == EMBEDDED else "Python's own reference"
    with _folder(args.out):
        made = measure(
            load,
            windows[::2] if asks else windows,
            schemes,
            args.rotations,
            model="the embedded model"
            if args.model == EMBEDDED
            else Path(args.model).resolve().name,
            text=texts or found,
            command=command(args),
            calibration=calibration,
            progress=sys.stderr.isatty(),
        )
        page = write(made, args.out)
    lines = [sentence(made, recommendation) for recommendation in made.recommendations]
    announce("\n".join([*lines, f"written to {page}"]))
    return 0


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder to write to, now rather than after hours; it goes if nothing comes of it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with beside(path / "report.json") as fresh:
            fresh.touch()
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def command(args: Namespace) -> str:
    """The whole command, with what was left out."""
    words = ["fastrot", "report", args.model, "--scheme", *args.scheme]
    words += ["--rotations", *in_order(args.rotations)] if args.rotations else []
    words += ["--tokens", str(args.tokens)]
    words += ["--text", *map(str, args.text)] if args.text else []
    return shlex.join([*words, "--out", str(args.out)])


def _embedded(args: Namespace, tokens: int, least: int) -> tuple[Callable[[], Any], Tensor]:
    from transformers import LlamaForCausalLM

    from fastrot.demo.corpus import heldout_files, read_bytes
    from fastrot.demo.evaluate import MODEL, OUTLIER_SCALE
    from fastrot.demo.outliers import with_outliers

    stream = torch.tensor(read_bytes(args.text or heldout_files())).long()
    windows = spread(stream, tokens, CONTEXT, least)

    def load() -> Any:
        model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        return with_outliers(model, scale=OUTLIER_SCALE)

    return load, windows


def _checkpoint(args: Namespace, tokens: int, least: int) -> tuple[Callable[[], Any], Tensor]:
    from fastrot.cli.checkpoint import load

    folder = Path(args.model)
    windows = windows_of(folder, args.text, tokens, least)
    return lambda: load(folder, "float32"), windows
