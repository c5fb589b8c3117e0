"""The commands ``plan``, ``rotate``, ``export``, ``serve``, ``architectures`` and ``demo``."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict, fields
from typing import Any

import fastrot
from fastrot.checkpoint.source import outline, weight_files
from fastrot.checkpoint.workers import parse_worker
from fastrot.cli.output import announce
from fastrot.errors import RotationError
from fastrot.verification import check_seed


def plan(args: Namespace) -> int:
    """Print what a rotation would do, and what it needs if the weights are there."""
    from fastrot.checkpoint.job import decode
    from fastrot.checkpoint.rotate import needs_of

    model = outline(args.source)
    decode(model)
    made = fastrot.plan(model.config, recipe_of(args))
    needs = needs_of(args.source, made, **_files_of(args)) if weight_files(args.source) else None
    if not args.json:
        print(made)
        if needs is not None:
            print(needs)
        return 0
    data = {
        "model_class": made.model_class,
        "seed": made.seed,
        "rows": list(made.rows()),
        "transform_config": made.transform_config.to_dict(),
        "needs": None if needs is None else asdict(needs),
    }
    print(json.dumps(data, indent=2, ensure_ascii=False))
    return 0


def rotate(args: Namespace) -> int:
    """Write a rotated copy of a checkpoint; the folder appears when it is complete, or never."""
    done = fastrot.rotate_checkpoint(
        args.source,
        args.target,
        recipe_of(args),
        **_files_of(args),
        memory=args.memory,
        worker=None if args.worker is None else parse_worker(args.worker),
        device=args.device,
        fresh=args.fresh,
        progress=sys.stderr.isatty(),
    )
    where = f"written to {args.target}"
    if not done.complete:
        where = f"{args.target} lacks {done.missing} files of weights, which other workers write"
    announce(f"{str(done.plan).splitlines()[0]}\n{where}")
    return 0


def export(args: Namespace) -> int:
    """Write a copy that a server computes right without fastrot."""
    schemes = fastrot.export(
        args.source, args.target, args.to, fresh=args.fresh, progress=sys.stderr.isatty()
    )
    announce("\n".join([*map(str, schemes), f"written to {args.target}"]))
    return 0


def serve(args: Namespace) -> int:
    """Hand over to transformers' command, in this process, where fastrot is imported."""
    from transformers.utils.import_utils import is_serve_available

    missing = RotationError(
        "fastrot serve needs fastapi, uvicorn, openai and pydantic, and not all of them are "
        "installed; pip install 'transformers[serving]'"
    )
    if not is_serve_available():
        raise missing
    try:
        from transformers.cli.transformers import app
    except ModuleNotFoundError as error:  # an older one needs more, such as requests
        raise missing from error
    app(["serve", *args.arguments], prog_name="fastrot")
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

    check_seed(args.seed, "--seed ")
    if args.json is not None and args.json.is_dir():
        raise IsADirectoryError(f"{args.json} is a folder; give a file to write")
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


def _files_of(args: Namespace) -> dict[str, Any]:
    """What else decides about the files of a rotation, as arguments."""
    import torch

    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    return {"dtype": dtype, "drafts": args.mtp, "shard": args.max_shard_size}


def options_of(args: Namespace) -> dict[str, Any]:
    """The options of the command line that are those of a recipe, as far as they were given."""
    names = {field.name for field in fields(fastrot.Recipe)}
    return {name: value for name, value in vars(args).items() if name in names}


def recipe_of(args: Namespace) -> fastrot.Recipe:
    """The recipe of the command line, with matrices of a file, or the recipe in a file."""
    options = options_of(args)
    if args.learned is not None:
        given = [*options, *(["spinquant"] if args.spinquant is not None else [])]
        if given:
            shown = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RotationError(f"{args.learned} is a whole recipe; leave {shown} out")
        return fastrot.Learned.load(args.learned)
    if args.spinquant is not None:
        matrices = fastrot.read_spinquant(args.spinquant)
        wanted = options.get("rotations", fastrot.Recipe.rotations)
        options["matrices"] = {name: m for name, m in matrices.items() if name in wanted}
        if not options["matrices"]:
            raise RotationError(
                f"{args.spinquant} has matrices for {' and '.join(matrices)}, which are not among "
                f"--rotations {' '.join(wanted)}; name them, or leave --spinquant out"
            )
    return fastrot.Recipe(**options)
