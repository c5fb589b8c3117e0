"""What a caller asks of the files, checked before anything is read."""

from numbers import Integral
from typing import Any, get_args

import torch

from fastrot.checkpoint.drafts import Drafts
from fastrot.checkpoint.workers import Worker
from fastrot.checks import FLOATS
from fastrot.errors import RotationError


def check_files(dtype: torch.dtype | None, drafts: str, shard: int | None) -> None:
    """Refuse what decides about the new files and means nothing.

    Raises:
        RotationError: a dtype that no weight is stored in, another word than ``copy`` or ``drop``,
            or no bytes for a file.
        TypeError: an argument of the wrong type.
    """
    names = ", ".join(map(str, FLOATS))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be one of {names}, or None, got {dtype!r}")
    if dtype is not None and dtype not in FLOATS:
        raise RotationError(f"dtype={dtype} is not one of {names}")
    if drafts not in get_args(Drafts):
        raise RotationError(f"drafts={drafts!r} is not one of {', '.join(get_args(Drafts))}")
    _check_bytes("shard", shard)


def check_process(memory: int | None, worker: Worker | None) -> None:
    """Refuse memory and a place among workers that no process has.

    Raises:
        RotationError: no bytes, or a number that no worker of so many has.
        TypeError: an argument of the wrong type.
    """
    _check_bytes("memory", memory)
    if worker is None:
        return
    if not isinstance(worker, Worker):
        raise TypeError(f"worker must be a Worker(rank, size), got {worker!r}")
    if not 0 <= worker.rank < worker.size:
        raise RotationError(f"{worker}: rank must be from 0 to size - 1")


def _check_bytes(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of bytes such as 1 << 30, got {value!r}")
    if value < 1:
        raise RotationError(f"{name}={value}: give bytes, 1 or more")
