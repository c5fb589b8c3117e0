"""``fastrot verify``: two checkpoints, tensor by tensor and by their logits."""

import gc
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from fastrot.checkpoint.shallow import LAYERS, NotComparedError, verify_first_layers
from fastrot.checkpoint.verify import verify_checkpoint
from fastrot.cli.checkpoint import load, load_tokenizer
from fastrot.errors import RotationError
from fastrot.lab.corpus import read_texts
from fastrot.learning.learned import Learned
from fastrot.transform_config import PRECISIONS
from fastrot.verification import (
    allowed,
    check_seed,
    coarsest,
    judge,
    logits,
    random_prompts,
    vocabulary,
)

EXACT = tuple(str(dtype).removeprefix("torch.") for dtype in reversed(PRECISIONS))
"""Names of the dtypes to compute in."""


def verify(args: Namespace) -> int:
    """Compare two checkpoints and print how they agree; 1 if that is not enough.

    Anything that only whole models have, such as a prompt, asks for them.
    """
    logits_wanted = (args.prompts, args.prompts_file, args.tolerance, args.precision, args.seed)
    if args.full or any(given not in ([], None) for given in logits_wanted):
        if args.layers is not None:
            raise ValueError(f"--layers {args.layers}: --full and its options take all layers")
        if args.learned is not None:
            raise ValueError(
                f"--learned {args.learned}: --full and its options compare logits, which need no "
                "recipe; leave it out"
            )
        return _by_logits(args)
    recipe = None if args.learned is None else Learned.load(args.learned)
    result = verify_checkpoint(args.source, args.target, recipe, progress=sys.stderr.isatty())
    print(result)
    layers = LAYERS if args.layers is None else args.layers
    return 0 if result and (layers == 0 or _first_layers(args, layers)) else 1


def _first_layers(args: Namespace, layers: int) -> bool:
    """Whether nothing speaks against the logits, which some models do not have by themselves."""
    try:
        compared = verify_first_layers(args.source, args.target, layers)
    except NotComparedError as reason:
        print(f"logits             not compared: {reason}; --full loads the whole models")
        return True
    print(compared)
    return bool(compared)


def _by_logits(args: Namespace) -> int:
    """One model at a time in memory, as :mod:`fastrot.verification`."""
    args.precision = args.precision or "float32"
    args.seed = args.seed or 0
    check_seed(args.seed, "--seed ")
    if args.tolerance is not None and not args.tolerance >= 0:
        raise ValueError(f"--tolerance {args.tolerance} is negative or no number")
    given = _given_prompts(args)
    dtype = getattr(torch, args.precision)
    rotated = load(args.target)
    tokens, stored = vocabulary(rotated), coarsest(rotated)
    prompts = [*random_prompts(rotated, args.seed), *given]
    got = logits(rotated.to(dtype), prompts)
    # One model at a time, as it may be large.
    del rotated
    gc.collect()
    original = load(args.source).to(dtype)
    if vocabulary(original) != tokens:
        raise RotationError(
            f"{args.source} has a vocabulary of {vocabulary(original)}, {args.target} of {tokens}"
        )
    expected = logits(original, prompts)
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = allowed(original, prompts, expected, stored)
    result = judge(got, expected, tolerance)
    count, length = prompts[0].shape
    print(f"prompts            {count} random ones of {length} tokens, {len(given)} given")
    print(f"computed in        {args.precision}")
    print(result)
    return 0 if result else 1


def _given_prompts(args: Namespace) -> list[Tensor]:
    texts = args.prompts
    if args.prompts_file is not None:
        lines = read_texts([args.prompts_file]).splitlines()
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"--prompts-file {args.prompts_file} has no prompt; give one a line")
    if not texts:
        return []
    tokenizer = load_tokenizer(Path(args.source))
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if not ids.numel():
            raise ValueError(f"prompt {text!r} has no tokens")
    return prompts
