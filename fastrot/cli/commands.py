"""The commands ``plan``, ``rotate``, ``architectures`` and ``demo``."""

import json
import sys
from argparse import Namespace
from dataclasses import fields

import fastrot
from fastrot.cli.checkpoint import load, outline, save, size
from fastrot.cli.output import announce
from fastrot.cli.staging import check_target, copy_companions, staged


def plan(args: Namespace) -> int:
    """Print what a rotation would do to a checkpoint, as far as shapes decide it."""
    made = fastrot.plan(outline(args.source).config, _recipe(args))
    if not args.json:
        print(made)
        return 0
    data = {
        "model_class": made.model_class,
        "seed": made.seed,
        "rows": list(made.rows()),
        "transform_config": made.transform_config.to_dict(),
    }
    print(json.dumps(data, indent=2, ensure_ascii=False))
    return 0


def rotate(args: Namespace) -> int:
    """Write a rotated copy of a checkpoint; the folder appears when it is complete, or never."""
    source, target = args.source.resolve(), args.target.resolve()
    check_target(source, target, size(source, args.dtype))
    with staged(target) as folder:
        copy_companions(source, folder)
        model = load(source, args.dtype)
        # After an error this model is thrown away: nothing needs to be taken back.
        handle = fastrot.apply(model, _recipe(args), undo="none", progress=sys.stderr.isatty())
        save(model, folder)
    announce(f"{str(handle).splitlines()[0]}\nwritten to {args.target}")
    return 0


def architectures(args: Namespace) -> int:
    """Print the tables."""
    from fastrot.mapping.document import architectures_document

    print(architectures_document(), end="")
    return 0


def demo(args: Namespace) -> int:
    """Print, and write, what rotations do to the model in this package."""
    import torch

    from fastrot.demo.evaluate import run, table

    if args.json is not None and not args.json.parent.is_dir():
        raise FileNotFoundError(f"{args.json.parent} is not a folder")
    # The matrices are small: a second thread would only wait.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = run(
            transform_type=args.transform_type,
            seed=args.seed,
            nbytes=args.bytes,
            progress=sys.stderr.isatty(),
        )
    finally:
        torch.set_num_threads(threads)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return 0


def _recipe(args: Namespace) -> fastrot.Recipe:
    """The options of the command line that are those of a recipe."""
    names = {field.name for field in fields(fastrot.Recipe)}
    return fastrot.Recipe(**{name: value for name, value in vars(args).items() if name in names})
