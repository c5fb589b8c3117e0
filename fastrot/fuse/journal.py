"""The undo journal: after an error in the middle, the model is what it was, bit for bit."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
from torch import Tensor, nn

Undo = Literal["auto", "memory", "disk", "none"]

HEADROOM = 1.25
"""The share of free memory, over the bytes to save, that ``auto`` asks for."""


class Journal:
    """Keeps what is overwritten until the end; leaving the ``with`` block by an error restores it.

    Args:
        nbytes: total size of what will be saved.
        undo: ``memory`` keeps the originals beside the weights, on their device; ``disk`` writes
            them to a temporary file, so that rotating needs no more memory than one weight;
            ``auto`` takes memory if there is enough, else the disk; ``none`` keeps nothing: for
            those who load the model anew after an error.

    Raises:
        ValueError: an unknown ``undo``.
        OSError: neither memory nor the temporary folder has room.
    """

    def __init__(self, nbytes: int, undo: Undo = "auto", device: torch.device | None = None):
        if undo not in get_args(Undo):
            raise ValueError(f"undo={undo!r} is not one of {', '.join(get_args(Undo))}")
        enough = nbytes * HEADROOM < free_memory(device or torch.device("cpu"))
        self.undo = undo if undo != "auto" else ("memory" if enough else "disk")
        self._undo: list[Callable[[], object]] = []
        self._written = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if self.undo == "disk":
            self._folder = tempfile.TemporaryDirectory(
                prefix="fastrot-undo-", ignore_cleanup_errors=True
            )
            free = shutil.disk_usage(self._folder.name).free
            if nbytes > free:
                self._folder.cleanup()
                raise OSError(
                    f"the undo journal needs {nbytes / 2**30:.1f} GiB and the temporary folder has "
                    f"{free / 2**30:.1f} GiB free; set TMPDIR to a larger disk"
                )

    @classmethod
    def of(cls, parameters: Sequence[Tensor], undo: Undo = "auto") -> "Journal":
        """A journal with room for these parameters, on the device of the first."""
        nbytes = sum(parameter.nbytes for parameter in parameters)
        return cls(nbytes, undo, parameters[0].device if parameters else None)

    def save(self, parameter: Tensor) -> None:
        """Remember the values of a parameter that is about to be written in place."""
        data = parameter.detach()
        self._written += 1
        if self.undo == "none":
            return
        if self._folder is None:
            copy = _copy(data)
            self.on_error(lambda: data.copy_(copy))
            return
        file = Path(self._folder.name, str(len(self._undo)))
        data.cpu().contiguous().view(torch.uint8).numpy().tofile(file)
        self.on_error(lambda: data.copy_(_read(file, data)))

    def replace(self, model: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Put another parameter in the place of ``name``."""
        owner, _, leaf = name.rpartition(".")
        self.set(model.get_submodule(owner), leaf, parameter)

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute, remembering the one it had."""
        old = getattr(owner, attribute, _ABSENT)
        self.on_error(lambda: _put_back(owner, attribute, old))
        setattr(owner, attribute, value)

    def on_error(self, action: Callable[[], object]) -> None:
        """Run ``action`` if the work fails; the last one given runs first.

        It may run before the change it takes back, or twice: interrupts come at any moment.
        """
        self._undo.append(action)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                self._restore()
                # An interrupt stays one, so that whoever waits for it sees it.
                if self.undo == "none" and self._written and isinstance(error, Exception):
                    raise RuntimeError(
                        "the weights are rotated in part and, with undo='none', can't be taken "
                        "back; load the model anew"
                    ) from error
        finally:
            self._undo.clear()
            if self._folder is not None:
                self._folder.cleanup()

    def _restore(self) -> None:
        """Take everything back, whatever single steps or impatient users do."""
        failed: list[Exception] = []
        while self._undo:
            try:
                self._undo[-1]()
                self._undo.pop()
            except KeyboardInterrupt:
                continue
            except Exception as error:
                failed.append(error)
                self._undo.pop()
        if failed:
            warnings.warn(
                f"{len(failed)} changes to the model could not be taken back ({failed[0]!r}, …); "
                "load it anew",
                RuntimeWarning,
                stacklevel=3,
            )


_ABSENT = object()


def _put_back(owner: Any, attribute: str, old: Any) -> None:
    if old is not _ABSENT:
        setattr(owner, attribute, old)
    elif hasattr(owner, attribute):
        delattr(owner, attribute)


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _read(file: Path, like: Tensor) -> Tensor:
    raw = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
    return raw.view(like.dtype).view(like.shape)


def _copy(data: Tensor) -> Tensor:
    if data.device.type != "cpu":
        return data.clone()
    # numpy asks for huge pages, which makes fresh memory several times cheaper.
    raw = torch.from_numpy(np.empty(data.numel() * data.element_size(), dtype=np.uint8))
    return raw.view(data.dtype).view(data.shape).copy_(data)
