"""Sources in fp8 with a scale for every block: made plain numbers within the one pass.

DeepSeek-V3 and others store ``e4m3`` codes and, under the name of the weight with ``_scale_inv``,
what to multiply each block of 128 x 128 of them with. The product enters the rotation in float32,
and the result is rounded once, to 16 bits: quantized again it would lose as much as the first time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrot.checkpoint.header import CheckpointError, Entry, read_entry
from fastrot.errors import RotationError

SUFFIX = "_scale_inv"
METHOD = "fp8"


@dataclass(frozen=True)
class Scales:
    """The factors of a weight's blocks.

    Attributes:
        codes: ``(rows, cols)``, ``e4m3`` or ``e5m2``.
        factors: ``(ceil(rows / block[0]), ceil(cols / block[1]))``, float32 or bfloat16.
        block: rows and columns that share a factor; the last may be cut.
    """

    codes: Entry
    factors: Entry
    block: tuple[int, int]

    @property
    def form(self) -> tuple[str, object]:
        """What decides about the numbers besides codes and factors."""
        return METHOD, self.block

    @property
    def numbers(self) -> Entry:
        """The weight as the model has it, where its codes lie."""
        return self.codes

    def decode(self, codes: Tensor, out: Tensor, first: int) -> None:
        """Write the numbers of some rows into ``out``, ``(rows, cols)`` float32.

        Args:
            codes: of these rows, ``e4m3`` or ``e5m2``.
            out: takes them.
            first: place of the first row in the weight.
        """
        factors = read_entry(self.factors).to(out.device, torch.float32)
        rows, cols = self.block
        out.copy_(codes)
        at = 0
        while at < len(out):
            number = (first + at) // rows
            end = min(len(out), (number + 1) * rows - first)
            out[at:end] *= factors[number].repeat_interleave(cols)[: out.shape[1]]
            at = end


def scales_of(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, Scales]:
    """The scales of every weight in fp8, by the weight's name.

    Args:
        entries: the tensors of the checkpoint.
        quantization: ``quantization_config`` of its config.json.

    Raises:
        RotationError: scales of another form, or of activations.
        CheckpointError: a weight lacks its scales, or they do not fit.
    """
    block = quantization.get("weight_block_size")
    if quantization.get("activation_scheme", "dynamic") != "dynamic":
        raise RotationError(
            f"activation_scheme={quantization['activation_scheme']!r}: the checkpoint's scales of "
            "activations are of the unrotated model; rotate the checkpoint in 16 bits"
        )
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) for b in block):
        raise RotationError(
            f"weight_block_size={block!r}: only blocks of rows and columns, such as [128, 128], "
            "are read; rotate the checkpoint in 16 bits"
        )
    found = {}
    for name, entry in entries.items():
        if entry.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            continue
        scale = entries.get(f"{name}{SUFFIX}")
        if scale is None:
            raise CheckpointError(f"{name} is fp8 but {name}{SUFFIX} is missing")
        expected = tuple(-(-n // b) for n, b in zip(entry.shape, block, strict=False))
        if len(entry.shape) != 2 or scale.shape != expected:
            raise CheckpointError(
                f"{name}{SUFFIX} is {scale.shape}, but {name} {entry.shape} in blocks of {block} "
                f"needs {expected}"
            )
        found[name] = Scales(entry, scale, (block[0], block[1]))
    return found


def without(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of quantization, here and in its parts."""
    return {
        key: without(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
