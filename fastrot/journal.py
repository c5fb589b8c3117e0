"""The undo journal: a change to a model happens as a whole, or the model is what it was."""

import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastrot.errors import BusyModelError, HalfRotatedError, RotationError
from fastrot.signals import held_signals

Undo = Literal["none", "memory", "disk"]


class Journal:
    """Takes back what was done in its ``with`` block if that ends by an error.

    Whatever can fail has happened before the block: it attaches modules, sets attributes and, at
    last, writes the weights, while SIGINT and SIGTERM wait. Attributes are always taken back.
    Weights are if copies were asked for; otherwise an error that comes after the first write, which
    nobody foresaw, leaves them useless, and ``lost`` is told.

    Args:
        parameters: the weights that the block will write.
        undo: ``memory`` copies them before the block begins, beside the originals, on their
            device; ``disk`` writes them to a temporary file; ``none`` keeps nothing.
        lost: called if the weights are rotated in part and can't be taken back.

    Raises:
        RotationError: an unknown ``undo``.
        OSError, MemoryError: no room for the copies.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor] = (),
        undo: Undo = "none",
        lost: Callable[[], object] = lambda: None,
    ):
        if undo not in get_args(Undo):
            raise RotationError(f"undo={undo!r} is not one of {', '.join(get_args(Undo))}")
        self._undo: list[Callable[[], object]] = []
        self._kept = undo != "none" or not parameters
        self._lost = lost
        self._writing = False
        self._hold = held_signals()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if undo == "memory":
            for data in (parameter.detach() for parameter in parameters):
                self._undo.append(_Restore(data, _copy(data)))
        elif undo == "disk":
            self._folder = _folder_for(parameters)
            try:
                for index, data in enumerate(parameter.detach() for parameter in parameters):
                    file = Path(self._folder.name, str(index))
                    data.cpu().contiguous().view(torch.uint8).numpy().tofile(file)
                    self._undo.append(_Restore(data, file))
            except BaseException:
                self._folder.cleanup()
                raise

    def writing(self) -> None:
        """From here on weights change."""
        self._writing = True

    def replace(self, model: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Put another parameter in the place of ``name``."""
        owner, _, leaf = name.rpartition(".")
        self.set(model.get_submodule(owner), leaf, parameter)

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute, remembering the one it had."""
        old = getattr(owner, attribute, _ABSENT)
        self.on_error(lambda: _put_back(owner, attribute, old))
        setattr(owner, attribute, value)

    def delete(self, owner: Any, attribute: str) -> None:
        """Delete an attribute of the owner itself, if it has one, remembering it."""
        if attribute in vars(owner):
            old = getattr(owner, attribute)
            self.on_error(lambda: _put_back(owner, attribute, old))
            delattr(owner, attribute)

    def on_error(self, action: Callable[[], object]) -> None:
        """Run ``action`` if the work fails; the last one given runs first.

        It may run before the change that it takes back was made.
        """
        self._undo.append(action)

    def __enter__(self) -> "Journal":
        self._hold.__enter__()
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
                if self._writing and not self._kept:
                    self._lost()
                    if isinstance(error, Exception):
                        raise HalfRotatedError(
                            f"the weights are rotated in part ({error!r}) and there are no copies "
                            "of the originals; load the model anew (undo='memory' or 'disk' keeps "
                            "copies)"
                        ) from error
        finally:
            self._undo.clear()
            if self._folder is not None:
                self._folder.cleanup()
            self._hold.__exit__(None, None, None)

    def _restore(self) -> None:
        """Take everything back, whatever single steps do."""
        failed: list[Exception] = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failed.append(error)
        if failed:
            warnings.warn(
                f"{len(failed)} changes to the model could not be taken back ({failed[0]!r}, …); "
                "load it anew",
                RuntimeWarning,
                stacklevel=3,
            )


class _Restore:
    """Writes the originals of a weight back into it."""

    def __init__(self, data: Tensor, original: Tensor | Path):
        self.data, self.original = data, original

    def __call__(self) -> None:
        if isinstance(self.original, Tensor):
            self.data.copy_(self.original)
        else:
            raw = torch.from_numpy(np.fromfile(self.original, dtype=np.uint8))
            self.data.copy_(raw.view(self.data.dtype).view(self.data.shape))


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Keep other threads from rotating a model meanwhile.

    Raises:
        BusyModelError: another thread is at it.
    """
    me = threading.get_ident()
    owner = model.__dict__.setdefault(_BUSY, me)
    if owner != me and any(thread.ident == owner for thread in threading.enumerate()):
        raise BusyModelError(
            f"another thread is rotating this {type(model).__name__}; wait until it has ended"
        )
    try:
        yield
    finally:
        model.__dict__.pop(_BUSY, None)


_ABSENT = object()
_BUSY = "_fastrot_busy"


def _put_back(owner: Any, attribute: str, old: Any) -> None:
    if old is not _ABSENT:
        setattr(owner, attribute, old)
    elif hasattr(owner, attribute):
        delattr(owner, attribute)


def _folder_for(parameters: Sequence[Tensor]) -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory(prefix="fastrot-undo-", ignore_cleanup_errors=True)
    needed, free = sum(p.nbytes for p in parameters), shutil.disk_usage(folder.name).free
    if needed > free:
        folder.cleanup()
        raise OSError(
            f"the undo journal needs {needed / 2**30:.1f} GiB and the temporary folder has "
            f"{free / 2**30:.1f} GiB free; set TMPDIR to a larger disk"
        )
    return folder


def _copy(data: Tensor) -> Tensor:
    if data.device.type != "cpu":
        return data.clone()
    # numpy asks for huge pages, which makes fresh memory several times cheaper.
    raw = torch.from_numpy(np.empty(data.numel() * data.element_size(), dtype=np.uint8))
    return raw.view(data.dtype).view(data.shape).copy_(data)
