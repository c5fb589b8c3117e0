# mypy: ignore-errors
# ruff: noqa: ANN001, ANN002, ANN202
"""How the CPU kernels are compiled, and kept on disk."""

import hashlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.compiler import compile_internal
from numba.core.targetconfig import ConfigStack
from numba.extending import lower_builtin, type_callable

from fastrot.kernels import _cpu_blocks


def _digest() -> str:
    folder = Path(_cpu_blocks.__file__).parent
    sources = ((folder / f"_cpu_{name}.py").read_bytes() for name in ("blocks", "parts", "vectors"))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


_SOURCES = _digest()


class _Cache(FunctionCache):
    """Numba's cache on disk, without which a kernel is compiled: it only ever saves time."""

    def load_overload(self, sig, target_context):
        """What is on disk; nothing, and the index emptied, if that can't be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling a damaged file raises
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        """Keep what was compiled if there is room."""
        with suppress(Exception):
            super().save_overload(sig, data)


def kernel(function: Callable[..., Any]) -> Any:
    """``njit`` with an on-disk cache where Numba finds a place for one.

    The cache sees changes of this file only; the digest in the name tells it of the others.
    """
    function.__qualname__ = f"{function.__name__}_{_SOURCES}"
    compiled = njit(error_model="numpy", nogil=True)(function)
    with suppress(RuntimeError, OSError):  # nowhere to write
        compiled._cache = _Cache(function)
    return compiled


def part(function: Callable[..., None]) -> Callable[..., None]:
    """What only kernels call: compiled into the library of each, once per types of arguments.

    A jitted function has a library of its own, which is optimised and made machine code, and again
    inside that of every caller: a third of the time until the first transform.
    """
    compiled = {}

    @type_callable(function)
    def typer(context):
        def returns(*arguments):
            return types.none

        returns.pysig = inspect.signature(function)
        return returns

    @lower_builtin(function, types.VarArg(types.Any))
    def emit(context, builder, call, arguments):
        typing, library = context.typing_context, context.active_code_library
        if (library, call.args) not in compiled:
            flags = ConfigStack().top().copy()
            flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            compiled[library, call.args] = compile_internal(
                typing, context, library, function, call.args, call.return_type, flags, {}
            ).fndesc
        return context.call_internal(builder, compiled[library, call.args], call, arguments)

    return function
