"""The command ``learn``."""

import sys
from argparse import Namespace
from pathlib import Path

from fastrot.cli.checkpoint import load
from fastrot.cli.commands import options_of
from fastrot.cli.output import announce
from fastrot.cli.texts import windows_of
from fastrot.errors import RotationError
from fastrot.learning.learned import Learned
from fastrot.learning.windows import HELD_OUT, JUDGES, SHORTEST
from fastrot.recipe import Recipe

FEWEST = HELD_OUT * JUDGES
"""Windows to learn from, those included that decide."""


def learn(args: Namespace) -> int:
    """Learn matrices for a checkpoint and a scheme, and write the recipe that has them."""
    from fastrot.lab.schemes import Scheme
    from fastrot.learning.learner import learn as fitted

    _check_out(args.out)
    least = FEWEST * (SHORTEST - 1)
    if args.tokens < least:
        raise RotationError(
            f"--tokens {args.tokens} are too few for {FEWEST} windows of {SHORTEST}; give {least} "
            "or more"
        )
    both = sorted({*map(Path.resolve, args.text)} & {*map(Path.resolve, args.heldout)})
    if both:
        raise RotationError(
            f"{both[0]} is in --text and in --heldout: what is learned from can't judge; hold out "
            "another file, or leave --heldout out"
        )
    recipe, scheme = Recipe(**options_of(args)), Scheme.parse(args.scheme)
    windows = windows_of(args.model, args.text, args.tokens, FEWEST)
    heldout = None
    if args.heldout:
        heldout = windows_of(args.model, args.heldout, args.tokens // HELD_OUT, JUDGES)
    kept = args.out.with_name(f"{args.out.name}.part")
    learned = fitted(
        load(args.model, "float32"),
        windows,
        recipe,
        scheme=scheme,
        heldout=heldout,
        steps=args.steps,
        refine=args.refine,
        permute=args.permute,
        keep=kept,
        progress=sys.stderr.isatty(),
    )
    learned.save(args.out)
    kept.unlink(missing_ok=True)
    announce(f"{learned}\nwritten to {args.out}; fastrot rotate SRC DST --learned {args.out}")
    return 0


def _check_out(out: Path) -> None:
    """Refuse what can't be written, or should not be: hours are spent before it is.

    Raises:
        OSError: a folder, in no folder, or a file that is no learned recipe.
    """
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; give a file to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} in")
    if out.exists():
        try:
            Learned.load(out)
        except RotationError:
            raise FileExistsError(
                f"{out} is there and no learned recipe; nothing else is overwritten"
            ) from None
