"""The arguments of every command."""

import argparse
from argparse import SUPPRESS
from pathlib import Path
from typing import Any, NoReturn

from fastrot.cli import commands
from fastrot.cli.learn import learn
from fastrot.cli.report import EMBEDDED, report
from fastrot.cli.verify import EXACT, LAYERS, verify
from fastrot.lab.sets import SCHEMES, SETS
from fastrot.mapping import ROTATIONS
from fastrot.recipe import Recipe
from fastrot.rotations import KINDS
from fastrot.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Make a wrong command line an error like any other."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The parser; what it parses has a function ``command`` that takes it and returns a status."""
    top = _Parser(prog="fastrot", description="Rotate language models for quantization, exactly.")
    top.add_argument("--version", action="version", version=f"fastrot {__version__}")
    actions = top.add_subparsers(required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show a traceback on errors")
    rotation, given, files = _rotation_options(), _given_options(), _file_options()

    plan = actions.add_parser(
        "plan",
        parents=[rotation, given, files, common],
        help="show what a rotation would do; reads config.json, no weights",
    )
    plan.add_argument("source", type=Path, metavar="MODEL_DIR")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(command=commands.plan)

    rotate = actions.add_parser(
        "rotate",
        parents=[rotation, given, files, common],
        help="write a rotated checkpoint; repeated after an interruption, it goes on",
    )
    rotate.add_argument("source", type=Path, metavar="SRC")
    rotate.add_argument("target", type=Path, metavar="DST", help="a new or an empty folder")
    rotate.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="for weights and scratch memory, such as 512M or 4G; default: 2G, or what the "
        "largest weight needs",
    )
    rotate.add_argument(
        "--worker",
        metavar="I/N",
        help="which of N processes this is, from 0; default: what torchrun, srun, a SLURM array or "
        "mpirun say",
    )
    rotate.add_argument(
        "--device",
        default="cpu",
        metavar="D",
        help="where weights are rotated: cpu, cuda or such as cuda:1; under torchrun cuda is the "
        "GPU of the local rank; default: cpu",
    )
    rotate.add_argument(
        "--fresh", action="store_true", help="throw away what an earlier run left unfinished"
    )
    rotate.set_defaults(command=commands.rotate)

    export = actions.add_parser(
        "export",
        parents=[common],
        help="write a copy of a checkpoint with R4 that vLLM serves without fastrot",
    )
    export.add_argument("source", type=Path, metavar="SRC", help="what fastrot rotate wrote")
    export.add_argument("target", type=Path, metavar="DST", help="a new or an empty folder")
    export.add_argument("--to", choices=("vllm",), default="vllm", help="default: vllm")
    export.add_argument(
        "--fresh", action="store_true", help="throw away what an earlier run left unfinished"
    )
    export.set_defaults(command=commands.export)

    verification = actions.add_parser(
        "verify",
        parents=[common],
        help="check that DST is SRC rotated: every tensor, and the logits of the first layers",
    )
    _add_verify_options(verification)
    verification.set_defaults(command=verify)

    # What follows is for another parser, so nothing there is an option of this one.
    serve = actions.add_parser(
        "serve",
        prefix_chars="\0",
        add_help=False,
        help="serve a model over HTTP: transformers serve, which knows rotated checkpoints then",
    )
    serve.add_argument("arguments", nargs="*", metavar="ARGUMENT")
    serve.set_defaults(command=commands.serve)

    architectures = actions.add_parser(
        "architectures", parents=[common], help="print which models are known, as Markdown"
    )
    architectures.set_defaults(command=commands.architectures)

    demo = actions.add_parser(
        "demo", parents=[common], help="quantize a small model with and without rotations"
    )
    demo.add_argument("--transform-type", choices=KINDS, default="hadamard")
    demo.add_argument("--seed", type=int, default=0, help="of everything random; default: 0")
    demo.add_argument("--bytes", type=_positive, default=65536, help="of text to evaluate on")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the measurements, too")
    demo.set_defaults(command=commands.demo)

    _add_learn(actions, [_rotation_options(ROTATIONS), common])

    measured = actions.add_parser(
        "report",
        parents=[common],
        help="measure which rotation is right for a model and a scheme; writes a page with plots",
    )
    measured.add_argument(
        "model",
        metavar="MODEL",
        help=f"the folder of a checkpoint, or {EMBEDDED}: the embedded one",
    )
    measured.add_argument(
        "--scheme",
        nargs="+",
        default=SCHEMES,
        metavar="S",
        help=f"such as w4a4kv4, w8a8, w4g128mse, fp8; default: {' '.join(SCHEMES)}",
    )
    measured.add_argument(
        "--rotations",
        nargs="+",
        metavar="SET",
        help=f"sets to compare, such as R1R2R4; default: {' '.join(SETS)}, if the model allows",
    )
    measured.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="to measure on; default: text that comes with Python",
    )
    measured.add_argument(
        "--tokens", type=_positive, default=8192, metavar="N", help="to predict; default: 8192"
    )
    measured.add_argument(
        "--out",
        type=Path,
        default=Path("fastrot-report"),
        metavar="FOLDER",
        help="default: fastrot-report",
    )
    measured.set_defaults(command=report)
    return top


def _add_learn(actions: Any, parents: list[_Parser]) -> None:
    learning = actions.add_parser(
        "learn",
        parents=parents,
        help="learn R1, R2 and R3 for a scheme; writes a recipe that rotate takes (--learned)",
    )
    learning.add_argument("model", type=Path, metavar="MODEL", help="the folder of a checkpoint")
    learning.add_argument("out", type=Path, metavar="OUT", help="a file, such as R.safetensors")
    learning.add_argument(
        "--scheme", default="w4a4kv4", metavar="S", help="what will be quantized; default: w4a4kv4"
    )
    learning.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="to learn from; default: text that comes with Python",
    )
    learning.add_argument(
        "--heldout",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="text that decides whether what was learned is taken, best of another kind, and of "
        "which a quarter of --tokens is read; default: a quarter of the other, from which nothing "
        "is learned then",
    )
    learning.add_argument(
        "--tokens", type=_positive, default=16384, metavar="N", help="to learn from; default: 16384"
    )
    learning.add_argument(
        "--steps", type=_positive, default=300, metavar="N", help="of descent; default: 300"
    )
    learning.add_argument(
        "--refine",
        type=_count,
        metavar="N",
        help="steps of a second descent, on the loss of the quantized model itself, which each run "
        "it forwards and backwards; default: 60 if the scheme rounds weights to nearest, else 0",
    )
    learning.add_argument(
        "--permute",
        action="store_true",
        help="first let channels change places, so that all blocks of R4 hold as much",
    )
    learning.set_defaults(command=learn)


def _rotation_options(rotations: tuple[str, ...] | None = None) -> _Parser:
    """The options of a recipe: what is not given is not there, and left to the recipe.

    Args:
        rotations: those by default, if not the recipe's.
    """
    options = _Parser(add_help=False, argument_default=SUPPRESS)
    usual = rotations or Recipe.rotations
    options.add_argument(
        "--rotations",
        nargs="+",
        type=_rotation,
        default=rotations or SUPPRESS,
        metavar="R",
        help=f"some of R1, R2 (fused), R3, R4 (online); default: {' '.join(usual)}",
    )
    options.add_argument("--transform-type", choices=KINDS)
    options.add_argument(
        "--randomize",
        action="store_true",
        default=SUPPRESS,
        help="R2, R3 and R4 of its own for every layer",
    )
    options.add_argument(
        "--keep-head",
        action="store_true",
        default=SUPPRESS,
        help="R1 leaves embedding, last norm and head alone, and acts online at both ends: tied "
        "embeddings stay tied",
    )
    options.add_argument(
        "--block-size",
        type=_block_size,
        action=_BlockSize,
        metavar="N",
        help="block-diagonal R1 and R4; or R4=N, for R4 alone, once for every rotation",
    )
    options.add_argument("--seed", type=int, help="of everything random; default: 0")
    options.add_argument(
        "--precision",
        choices=tuple(EXACT),
        help="of the arithmetic; default: float64 on weights, float32 on activations",
    )
    return options


def _given_options() -> _Parser:
    """Files with matrices, which learning has no use for."""
    options = _Parser(add_help=False)
    options.add_argument(
        "--spinquant",
        type=Path,
        metavar="FILE",
        help="matrices for R1 and R2 that SpinQuant's training wrote (R.bin)",
    )
    options.add_argument(
        "--learned",
        type=Path,
        metavar="FILE",
        help="a whole recipe, which fastrot learn wrote, in the place of --rotations and what "
        "describes them",
    )
    return options


def _file_options() -> _Parser:
    """What decides about files besides the rotation."""
    options = _Parser(add_help=False)
    options.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", *EXACT),
        default="auto",
        help="of the weights; default: as they are",
    )
    options.add_argument(
        "--max-shard-size", type=_bytes, metavar="SIZE", help="of a file; default: files as in SRC"
    )
    options.add_argument(
        "--mtp",
        choices=("copy", "drop"),
        default="copy",
        help="what to do with tensors of multi-token prediction; copying is exact without R1, "
        "and with --keep-head",
    )
    return options


def _add_verify_options(options: _Parser) -> None:
    options.add_argument("source", type=Path, metavar="SRC")
    options.add_argument("target", type=Path, metavar="DST")
    options.add_argument(
        "--full",
        action="store_true",
        help="load both models, one after the other, and compare their logits instead; the "
        "options from --prompts to --seed ask for that, too",
    )
    options.add_argument(
        "--layers",
        type=_count,
        metavar="N",
        help="after every tensor, compare the logits of models that end after N layers, which "
        f"takes these, embedding and head in float32; default: {LAYERS}, 0 for none",
    )
    texts: Any = options.add_mutually_exclusive_group()
    texts.add_argument("--prompts", nargs="+", default=[], metavar="TEXT")
    texts.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt in every line")
    options.add_argument(
        "--tolerance",
        type=float,
        help="greatest relative error of the logits; default: 1e-5 (1e-6 in float64), or twice "
        "what rounding the weights to the dtype of DST does to SRC, if that is more",
    )
    options.add_argument(
        "--precision", choices=tuple(EXACT), help="to compute in; default: float32"
    )
    options.add_argument("--seed", type=int, help="of the random prompts; default: 0")
    options.add_argument(
        "--learned", type=Path, metavar="FILE", help="the learned recipe of DST, if it has one"
    )


def _rotation(text: str) -> str:
    """A name in any case; the words after ``--rotations`` may be paths that were meant for SRC."""
    if text.upper() not in ROTATIONS:
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(ROTATIONS)}; folders and files come "
            "before --rotations)"
        )
    return text.upper()


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _block_size(text: str) -> int | dict[str, int]:
    name, named, size = text.rpartition("=")
    return {name.upper(): _positive(size)} if named else _positive(size)


class _BlockSize(argparse.Action):
    """One size for all, or a dict of those that were named."""

    def __call__(self, parser: Any, args: Any, value: Any, option: str | None = None) -> None:
        old = getattr(args, self.dest, None)
        if isinstance(old, dict) and isinstance(value, dict) and not old.keys() & value.keys():
            value = old | value
        elif old is not None:
            parser.error(f"{option}: one size for all, or one for each rotation by its name")
        setattr(args, self.dest, value)


def _bytes(text: str) -> int:
    """A size such as ``512M``, in units of 1024."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    try:
        size = int(float(number) * 1024 ** powers[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 4G")
    return size
