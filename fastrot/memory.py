"""Whose memory a weight lies on (torch's own, another's, one that others see), and new tensors."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fastrot.errors import RotationError

MAPS = Path("/proc/self/maps")


class _Mapping(NamedTuple):
    start: int
    end: int
    rights: str
    path: str


def on_cpu() -> AbstractContextManager[Any]:
    """New tensors lie on the CPU, whatever default device or mode surrounds the caller.

    Where they do anyway nothing is entered: under a mode every call of torch goes through Python.
    """
    probe = torch.empty(0)
    plain = probe.device.type == "cpu" and not has_torch_function((probe,))
    return nullcontext() if plain else torch.device("cpu")


def owned(tensor: Tensor) -> bool:
    """Whether torch allocated the memory of a tensor.

    If not, it belongs to a NumPy array, to bytes or to a mapped file, which somebody may still
    read or believe unchangeable.
    """
    return tensor.device.type != "cpu" or bool(tensor.untyped_storage().resizable())


def check_memory(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights on memory that can't be written, or that other processes see.

    Writing the first crashes. The second is the file on disk or another process's model, and moving
    it elsewhere would end the sharing in silence. Linux tells by ``/proc/self/maps``; elsewhere
    torch's own shared memory is all that can be seen.

    Raises:
        RotationError: names the parameter, the file if there is one, and the way out.
    """
    mappings = list(_mappings())
    for name, tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        at = tensor.data_ptr()
        found = next((m for m in mappings if m.start <= at < m.end), None)
        place = f" ({found.path})" if found is not None and found.path.startswith("/") else ""
        if found is not None and "w" not in found.rights:
            what = f"memory that can't be written{place}"
        elif tensor.is_shared() or (found is not None and "s" in found.rights):
            what = f"memory that other processes or a file share{place}"
        else:
            continue
        raise RotationError(
            f"{name} lies on {what}; give it memory of its own with "
            "parameter.data = parameter.data.clone()"
        )


def _mappings() -> Iterator[_Mapping]:
    """The mappings that are not plain private memory."""
    if not MAPS.exists():
        return
    for line in MAPS.read_text(errors="replace").splitlines():
        span, rights, *rest = line.split(maxsplit=5)
        if rights[1] == "w" and rights[3] == "p":
            continue
        start, end = (int(address, 16) for address in span.split("-"))
        path = rest[3] if len(rest) > 3 else ""
        # Page-locked memory of a driver is shared with a device, not with a process.
        if not path.startswith("/dev/nvidia"):
            yield _Mapping(start, end, rights, path)
