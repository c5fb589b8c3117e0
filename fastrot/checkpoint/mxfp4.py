"""Sources in mxfp4, as gpt-oss is released: made plain numbers within the one pass.

A weight of experts is stored under its name with ``_blocks``, 16 bytes for 32 numbers along the
input, the lower half of a byte first, and with ``_scales``, the exponents of these blocks plus 127
(OCP Microscaling Formats 1.0, e2m1 and e8m0). The model has it with inputs before outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrot.checkpoint.header import CheckpointError, Entry, read_entry

METHOD = "mxfp4"
CODES, EXPONENTS = "_blocks", "_scales"
BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CHUNK = 1 << 18
"""Bytes of codes that are decoded at a time."""


@dataclass(frozen=True)
class Blocks:
    """The codes and exponents of a weight of experts.

    Attributes:
        codes: ``(experts, outputs, inputs / 32, 16)`` uint8.
        factors: ``(experts, outputs, inputs / 32)`` uint8.
    """

    codes: Entry
    factors: Entry

    @property
    def form(self) -> tuple[str, object]:
        """What decides about the numbers besides codes and factors."""
        return METHOD, BLOCK

    @property
    def numbers(self) -> Entry:
        """The weight as the model has it, ``(experts, inputs, outputs)``, where its codes lie."""
        experts, outputs, count, _ = self.codes.shape
        shape, name = (experts, count * BLOCK, outputs), self.codes.name.removesuffix(CODES)
        return Entry(shape, torch.bfloat16, name, self.codes.file, self.codes.offset)

    def decode(self, codes: Tensor, out: Tensor, first: int) -> None:
        """Write the numbers of some experts into ``out``, ``(experts, inputs, outputs)`` float32.

        Args:
            codes: of these experts.
            out: takes them.
            first: number of the first expert.
        """
        exponents = read_entry(self.factors, slice(first, first + len(codes)))
        factors = exponents.view(torch.float8_e8m0fnu)
        values = torch.tensor([*VALUES, *(-value for value in VALUES)], device=out.device)
        byte = torch.arange(256, device=out.device)
        pairs = torch.stack([values[byte % 16], values[byte // 16]], -1)
        _, rows, count, width = codes.shape
        step = max(1, CHUNK // (count * width))
        for expert, numbers in enumerate(out):
            blocks = numbers.T.unflatten(1, (count, width, 2))
            for start in range(0, rows, step):
                part = slice(start, start + step)
                scale = factors[expert, part].float().to(out.device)[..., None, None]
                blocks[part] = pairs[codes[expert, part].int()] * scale


def blocks_of(entries: Mapping[str, Entry]) -> dict[str, Blocks]:
    """All weights in mxfp4, by their names in the model.

    Raises:
        CheckpointError: a weight lacks its scales, or they do not fit.
    """
    found = {}
    for name, codes in entries.items():
        if codes.dtype.is_floating_point and codes.dtype.itemsize == 1:
            raise CheckpointError(
                f"{name} is {codes.dtype}, of which an mxfp4 checkpoint says no scales; store it "
                "in 16 bits"
            )
        if not name.endswith(CODES) or codes.dtype != torch.uint8:
            continue
        weight = name.removesuffix(CODES)
        scale = entries.get(f"{weight}{EXPONENTS}")
        if scale is None:
            raise CheckpointError(f"{name} is mxfp4 but {weight}{EXPONENTS} is missing")
        if weight in entries:
            raise CheckpointError(
                f"{weight} is there in plain numbers and in mxfp4 ({name}); take one of them out"
            )
        fits = len(codes.shape) == 4 and codes.shape[3] * 2 == BLOCK
        if not fits or scale.shape != codes.shape[:3] or scale.dtype != torch.uint8:
            raise CheckpointError(
                f"{name} is {codes.shape} and {scale.name} {scale.shape} of {scale.dtype}: mxfp4 "
                "is (experts, outputs, blocks, 16), and the same without the last, of uint8"
            )
        found[weight] = Blocks(codes, scale)
    return found
