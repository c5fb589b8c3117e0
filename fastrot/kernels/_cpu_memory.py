"""What the kernels ask of the memory that they write: huge pages, and leave to write.

Both questions are system calls of Linux; elsewhere nothing is asked.
"""

import ctypes
import mmap
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

from fastrot.errors import RotationError

HUGE_BYTES = 1 << 22
"""Smaller results stay as the allocator made them (NumPy draws the same line)."""

_HUGEPAGE, _POPULATE_READ, _POPULATE_WRITE = 14, 22, 23


@lru_cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def prepare_output(x: Tensor, out: Tensor) -> None:
    """:func:`ask_for_huge_pages` and :func:`require_writable`."""
    ask_for_huge_pages(x, out)
    require_writable(out)


def ask_for_huge_pages(x: Tensor, out: Tensor) -> None:
    """Of the memory behind a large fresh result (madvise(2), ``MADV_HUGEPAGE``).

    The first touch of fresh memory costs more than a transform, page by page; pages that exist
    already are left alone.

    Args:
        x: the tensor to be read.
        out: a matrix or contiguous; ``x`` itself if in place.
    """
    madvise = _madvise()
    first, last = out.data_ptr(), _last(out)
    if madvise is not None and first != x.data_ptr() and last - first >= HUGE_BYTES:
        madvise(_page(first), last - _page(first), _HUGEPAGE)


def require_writable(out: Tensor) -> None:
    """Refuse memory that cannot be written, in which a kernel could only crash.

    The first and the last page are asked, from Linux 5.14 on; at once if they are neighbours, since
    a question takes as long as a short row.

    Raises:
        RotationError: ``out`` lies in memory that may be read but not written.
    """
    madvise = _madvise()
    if madvise is None:
        return
    first, last = _page(out.data_ptr()), _page(_last(out))
    near = last - first <= mmap.PAGESIZE
    for page, length in ((first, last + 1 - first),) if near else ((first, 1), (last, 1)):
        if madvise(page, length, _POPULATE_WRITE) and not madvise(page, length, _POPULATE_READ):
            raise RotationError(
                f"cannot write into a tensor of shape {tuple(out.shape)}: it lies in read-only "
                "memory, such as a file mapped for reading; rotate a copy, or map the file "
                "copy-on-write"
            )


def _page(address: int) -> int:
    return address // mmap.PAGESIZE * mmap.PAGESIZE


def _last(out: Tensor) -> int:
    """The address of the last element."""
    if out.is_contiguous():
        return out.data_ptr() + out.nbytes - out.element_size()
    steps = zip(out.shape, out.stride(), strict=True)
    return int(out.data_ptr() + sum((size - 1) * step for size, step in steps) * out.element_size())
