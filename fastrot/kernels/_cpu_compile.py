# mypy: ignore-errors
# ruff: noqa: ANN001, ANN002, ANN202
"""How the CPU kernels are compiled, and kept on disk."""

import hashlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from ctypes import CFUNCTYPE, c_char_p
from functools import cached_property
from pathlib import Path

from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler import compile_internal
from numba.core.targetconfig import ConfigStack
from numba.extending import lower_builtin, type_callable

from fastrot.kernels import _cpu_blocks


def _digest() -> str:
    folder = Path(_cpu_blocks.__file__).parent
    names = "blocks", "compile", "kernels", "parts", "rows", "vectors"
    files = *(folder / f"_cpu_{name}.py" for name in names), folder.parent / "hadamard.py"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


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


class Kernel:
    """Native code of a function of one address, compiled when it is first needed.

    It is kept on disk where Numba finds a place for that. Numba's index of what is there sees
    changes of one file only, and only if its time or size changes; the digest in the name tells it
    of all.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function

    def __call__(self, argument: bytes) -> None:
        """Run it with the address of ``argument``, without the interpreter's lock."""
        self.native(argument)

    def prepare(self) -> None:
        """Compile it, or find it on disk, unless that is done."""
        _ = self.native

    @cached_property
    def native(self):
        """The code as a function of ctypes."""
        return CFUNCTYPE(None, c_char_p)(self.code.address)

    @cached_property
    def code(self):
        """What Numba made, or found on disk."""
        function = self._function
        function.__qualname__ = f"{function.__name__}_{_SOURCES}"
        code = CFunc(function, ((types.int64,), types.void), {}, {"error_model": "numpy"})
        with suppress(RuntimeError, OSError):  # nowhere to write
            code._cache = _Cache(function)
        code.compile()
        return code


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
