"""Headers of safetensors files: what lies where, without reading a tensor.

A file is eight bytes with the length of the header, the header (JSON), and the tensors one after
the other, without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastrot.errors import RotationError

ALIGNED = 64
"""Tensors begin on a multiple of so many bytes, in files and in panels: a line of the caches. The
kernel of Linux copies to a page from another place in a line at half the rate."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

LONGEST = 100_000_000
"""Bytes of a header; safetensors reads none that is longer."""

Metadata = dict[str, str]


class CheckpointError(RotationError):
    """A checkpoint that is damaged, incomplete, or not what its configuration describes."""


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry(Layout):
    """A tensor in a file.

    Attributes:
        name: of the tensor.
        file: where it lies.
        offset: bytes from the start of the file.
    """

    name: str
    file: Path
    offset: int


def read_header(file: Path) -> tuple[dict[str, Entry], Metadata]:
    """The tensors of a file in the order in which they lie, and its metadata.

    Raises:
        CheckpointError: it is damaged or cut short.
        OSError: it can't be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST):
            raise CheckpointError(
                f"{file} is no safetensors file, or cut short: {size:,} bytes, of which the header "
                f"would take {length:,}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        found = sorted(
            ((item["data_offsets"], name, item) for name, item in header.items()),
            key=lambda found: (found[0], found[1]),
        )
        entries = {
            name: Entry(
                tuple(operator.index(n) for n in item["shape"]),
                _dtype(file, name, item["dtype"]),
                name,
                file,
                8 + length + start,
            )
            for (start, _), name, item in found
        }
        ends = [(start, end) for (start, end), _, _ in found]
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {file} is damaged: {type(error).__name__}: {error}"
        ) from error
    at = 0
    for entry, (start, end) in zip(entries.values(), ends, strict=True):
        if start != at or end - start != entry.nbytes or min(entry.shape, default=0) < 0:
            raise CheckpointError(
                f"the header of {file} is damaged: {entry.name} {entry.shape} of "
                f"{NAMES[entry.dtype]} would lie at {start:,} to {end:,}, after {at:,}"
            )
        at = end
    if 8 + length + at != size:
        raise CheckpointError(
            f"{file} has {size:,} bytes, but its header describes {8 + length + at:,}: it is cut "
            "short or damaged; copy or download it again"
        )
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _dtype(file: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise CheckpointError(
            f"{name} in {file} is of dtype {code!r}, which is none of {', '.join(DTYPES)}"
        )
    return DTYPES[code]


def read_headers(files: Iterable[Path]) -> tuple[dict[str, Entry], dict[Path, Metadata]]:
    """The tensors of all files, and the metadata of each.

    Raises:
        CheckpointError: a file is damaged, or two files hold one name.
        OSError: a file is missing or can't be read.
    """
    entries: dict[str, Entry] = {}
    metadata = {}
    for file in files:
        found, metadata[file] = read_header(file)
        twice = entries.keys() & found.keys()
        if twice:
            name = min(twice)
            raise CheckpointError(f"{name} lies in {entries[name].file} and in {file}")
        entries |= found
    return entries, metadata


def header_of(layouts: Mapping[str, Layout], metadata: Metadata) -> tuple[bytes, dict[str, int]]:
    """The head of a file with these tensors, and the place of each in the file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts, at = {}, 0
    for name, layout in layouts.items():
        end = at + layout.nbytes
        header[name] = {
            "dtype": NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [at, end],
        }
        starts[name], at = at, end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNED)
    head = len(raw).to_bytes(8, "little") + raw
    return head, {name: len(head) + start for name, start in starts.items()}


def read_into(descriptor: int, entry: Entry, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with bytes of a tensor, from its byte ``start`` on.

    Raises:
        CheckpointError: the file ends before.
        OSError: it can't be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], entry.offset + start + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(entry.file)) from error
        if count <= 0:
            raise CheckpointError(f"{entry.file} ends within {entry.name}: it was cut short")
        done += count


def read_entry(entry: Entry, rows: slice = slice(None)) -> torch.Tensor:
    """A whole tensor of a file, or some of its first dimension, in new memory."""
    start, stop, _ = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
    row = entry.nbytes // max(1, entry.shape[0] if entry.shape else 1)
    nbytes = row * (stop - start)
    buffer = bytearray(max(1, nbytes))
    with entry.file.open("rb") as stream:
        read_into(stream.fileno(), entry, row * start, memoryview(buffer)[:nbytes])
    raw = torch.frombuffer(buffer, dtype=torch.uint8)[:nbytes]
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    return raw.view(entry.dtype).view(shape)


def same_bytes(a: Entry, b: Entry, chunk: int = 1 << 26) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    size = min(chunk, a.nbytes)
    left, right = bytearray(size), bytearray(size)
    with a.file.open("rb") as of_a, b.file.open("rb") as of_b:
        for start in range(0, a.nbytes, chunk):
            length = min(chunk, a.nbytes - start)
            read_into(of_a.fileno(), a, start, memoryview(left)[:length])
            read_into(of_b.fileno(), b, start, memoryview(right)[:length])
            if left[:length] != right[:length]:
                return False
    return True
