"""``fastrot verify``: do two checkpoints compute the same logits?

How far may they differ? In exact arithmetic not at all, and floating point adds about 1e-6 in
float32. But the weights of a rotated checkpoint were rounded once, to the dtype it is stored in,
and how much that moves the logits depends on the model. So it is measured: noise of the size of
such a rounding is put on the original's weights. Twice what it does is allowed.
"""

import gc
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.cli.checkpoint import load, load_tokenizer
from fastrot.errors import RotationError

EXACT = {"float32": 1e-5, "float64": 1e-6}
"""The relative error of the logits that arithmetic alone may make."""

RANDOM_PROMPTS = (4, 64)


def verify(args: Namespace) -> int:
    """Compare two checkpoints and print how far they agree; 1 if that is not enough."""
    if args.tolerance is not None and not args.tolerance >= 0:
        raise ValueError(f"--tolerance {args.tolerance} is negative or no number")
    given = _given_prompts(args)
    dtype = getattr(torch, args.precision)
    rotated = load(args.target)
    vocabulary = _vocabulary(rotated)
    generator = torch.Generator().manual_seed(args.seed)
    count, length = RANDOM_PROMPTS[0], min(RANDOM_PROMPTS[1], _positions(rotated))
    prompts = [torch.randint(vocabulary, (count, length), generator=generator), *given]
    stored = max(torch.finfo(weight.dtype).eps for weight in rotated.parameters())
    got = _logits(rotated.to(dtype), prompts)
    # One model at a time, as it may be large.
    del rotated
    gc.collect()
    model = load(args.source).to(dtype)
    if _vocabulary(model) != vocabulary:
        raise ValueError(
            f"{args.source} has a vocabulary of {_vocabulary(model)}, {args.target} of {vocabulary}"
        )
    expected = _logits(model, prompts)
    tolerance = args.tolerance
    if tolerance is None:
        add_rounding_noise(model, stored)
        noise = relative_error(_logits(model, prompts), expected)
        tolerance = max(EXACT[args.precision], 2 * noise)
    made = f"{count} random ones of {length} tokens, {len(given)} given"
    return _judge(got, expected, tolerance, made, args.precision)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of ``expected``; all tensors together."""
    difference = _norm([a - b for a, b in zip(got, expected, strict=True)])
    norm = _norm(expected)
    if not norm:
        return math.inf if difference else 0.0
    return difference / norm


@torch.no_grad()
def add_rounding_noise(model: nn.Module, eps: float) -> None:
    """Add what a rounding does to weights that were rotated.

    All entries of a rotated row are about as large as its root mean square, and so are the errors
    of all, wherever the original row was small.

    Args:
        model: float32 or float64.
        eps: distance from 1 to the next number of the dtype that is rounded to.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 0.5
        weight.add_(eps * noise * weight.square().mean(-1, keepdim=True).sqrt())


def _given_prompts(args: Namespace) -> list[Tensor]:
    texts = args.prompts
    if args.prompts_file is not None:
        texts = [line for line in args.prompts_file.read_text().splitlines() if line.strip()]
    if not texts:
        return []
    tokenizer = load_tokenizer(Path(args.source))
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if not ids.numel():
            raise ValueError(f"prompt {text!r} has no tokens")
    return prompts


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _positions(model: Any) -> int:
    """How many tokens a prompt may have, for all that the configuration says."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else RANDOM_PROMPTS[1]


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    try:
        return [model(ids, use_cache=False).logits for ids in prompts]
    except IndexError as error:
        longest, largest = max(ids.shape[-1] for ids in prompts), max(int(i.max()) for i in prompts)
        raise RotationError(
            f"a {type(model).__name__} of {_vocabulary(model)} tokens and {_positions(model)} "
            f"positions can't read prompts with token {largest} and of length {longest} ({error})"
        ) from error


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _judge(
    got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, made: str, precision: str
) -> int:
    pairs = list(zip(got, expected, strict=True))
    error = relative_error(got, expected)
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    positions = sum(logits.shape[:2].numel() for logits in expected)
    verified = error <= tolerance
    print(f"prompts            {made}")
    print(f"max logit error    {largest:.2e} in {precision}")
    print(f"relative error     {error:.2e}, tolerance {tolerance:.2e}")
    print(f"greedy next token  the same at {same} of {positions} positions")
    print("verified: the same function" if verified else "FAILED: not the same function")
    return 0 if verified else 1
