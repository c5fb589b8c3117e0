"""Where panels are rotated: on the CPU, or on a GPU that they are copied to and back from."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrot.checkpoint.panels import Panel
from fastrot.errors import RotationError

CPU = torch.device("cpu")

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Variables of launchers that tell the number of a process on its machine."""


def device_of(
    given: str | torch.device, environment: Mapping[str, str] | None = None
) -> torch.device:
    """The device that a caller means, there and with an index.

    ``cuda`` alone is the launcher's number of this process on its machine, modulo the number of
    GPUs; without a launcher it is torch's current one.

    Args:
        given: ``cpu``, ``cuda`` or such as ``cuda:1``; ROCm's are called cuda, too.
        environment: that of the process by default.

    Raises:
        RotationError: there is no such device, or none that weights are rotated on.
    """
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise RotationError(f"--device {given} is none: expected cpu, cuda or cuda:1") from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise RotationError(f"--device {given}: weights are rotated on cpu and on cuda")
    if not torch.cuda.is_available():
        raise RotationError(
            f"--device {given}: torch {torch.__version__} finds no GPU here; leave --device out to "
            "rotate on the CPU"
        )
    count = torch.cuda.device_count()
    index = _nearest(count, environment) if device.index is None else device.index
    if index >= count:
        raise RotationError(f"--device {given}: the last of {count} GPUs here is cuda:{count - 1}")
    return torch.device("cuda", index)


def _nearest(count: int, environment: Mapping[str, str] | None) -> int:
    found = os.environ if environment is None else environment
    for name in LOCAL_RANKS:
        if name in found:
            if not found[name].isdecimal():
                raise RotationError(f"{name}={found[name]}: expected a number from 0")
            return int(found[name]) % count
    return torch.cuda.current_device()


def arithmetic_of(device: torch.device) -> str:
    """What rounds alike: a GPU adds up in another order than the CPU, each generation in its own.

    Both are right to one rounding, but files of both in one checkpoint would be those of neither.
    """
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{'rocm' if torch.version.hip else 'cuda'} {major}.{minor}"


def is_apart(device: torch.device) -> bool:
    """Whether a device has memory of its own, which panels are copied to."""
    return device.type != "cpu"


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None on the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Memory(NamedTuple):
    """Of a panel, ``(nbytes,)`` uint8 each.

    Attributes:
        host: where files are read to, and written from.
        work: where the panel is rotated: on the device, or the same.
    """

    host: Tensor
    work: Tensor

    @classmethod
    def on(cls, device: torch.device, nbytes: int) -> "Memory":
        """Memory that holds nothing yet."""
        # NumPy asks for huge pages: touching fresh memory costs more than the transform.
        host = torch.from_numpy(np.empty(nbytes, np.uint8))
        work = torch.empty(nbytes, dtype=torch.uint8, device=device) if is_apart(device) else host
        return cls(host, work)

    @property
    def nbytes(self) -> int:
        """Of one of them."""
        return len(self.host)

    def send(self, panel: Panel) -> None:
        """Bring what was read to the device."""
        if self.work is not self.host and panel.acts:
            length = panel.read[1]
            self.work[:length].copy_(self.host[:length])

    def fetch(self, panel: Panel) -> Tensor:
        """Bring the result back from the device; its bytes on the host."""
        result = panel.result(self.host)
        if self.work is not self.host and panel.acts:
            result.copy_(panel.result(self.work))
        return result


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Let copies of this thread run beside the kernels of another."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def settled(device: torch.device) -> None:
    """Wait for the kernels of this thread, so that a stream of another may read their results."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
