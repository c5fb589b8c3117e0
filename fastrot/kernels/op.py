"""``hadamard_transform`` and its torch operators: tracing, differentiation, dispatch."""

from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError
from fastrot.kernels.arguments import check, check_out, check_scale, whole
from fastrot.kernels.run import run, run_into
from fastrot.kernels.watched import is_plain, is_transformed


def hadamard_transform(
    x: Tensor,
    scale: float = 1.0,
    *,
    dim: int = -1,
    block_size: int | None = None,
    signs: Tensor | None = None,
    transpose: bool = False,
    impl: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Multiply the vectors along one dimension by a Hadamard matrix: ``scale · (x D) H``.

    Args:
        x: any shape, float64, float32, bfloat16 or float16. Intermediates are float64 for float64
            and float32 otherwise; the result is rounded once to the dtype of ``x``.
        scale: factor of the result; ``block_size ** -0.5`` makes the transform orthonormal.
        dim: the dimension along which the vectors lie.
        block_size: apply ``I ⊗ H`` with blocks of this size; default the whole dimension.
        signs: ``(block_size,)`` of ±1 on the device of ``x``, the diagonal of ``D``; default the
            identity. On the CPU other values are refused; on a GPU, where looking would wait for
            the device, they are the caller's word.
        transpose: compute ``scale · (x Hᵀ) D`` instead, the inverse if orthonormal. Hadamard
            matrices whose order is not a power of two are in general not symmetric.
        impl: ``"reference"`` (plain torch, any device), ``"cpu"`` (numba), ``"triton"`` (CUDA and
            ROCm tensors; CPU tensors under ``TRITON_INTERPRET=1``) or ``"auto"``: ``cpu`` for CPU
            tensors, ``triton`` for CUDA tensors, ``reference`` on any other device.
        out: where the result goes: ``x`` itself, or another tensor of its shape, dtype and device.
            As everywhere in torch, not while autograd records.

    Returns:
        ``out``, or a new tensor of the shape and dtype of ``x``, which is differentiable in ``x``,
        forwards and backwards and under the transforms of ``torch.func``. ``torch.compile`` and
        ``torch.export`` trace one operator.

    Raises:
        RotationError: no Hadamard matrix of that size, a block size that does not divide, an
            unknown or impossible ``impl``; signs that are not ±1, lie elsewhere or require
            gradients; a scale or ``dim`` that is no number; an ``out`` that is not like ``x``,
            lies in read-only memory, or is given where something differentiates.
        TypeError: ``x`` is not a dense tensor of one of the four dtypes.

    H is ordered naturally (Sylvester's) for powers of two; for ``m · 2^k`` see
    :func:`fastrot.hadamard.factors`.
    """
    if type(dim) is not int:
        dim = whole("dim", dim)
    dims = x.dim() if isinstance(x, Tensor) else 0
    if not -dims <= dim < dims:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise RotationError(f"hadamard_transform needs a tensor with dimension {dim}, got {what}")
    if type(scale) is not float:
        check_scale(scale)
    dim %= dims
    size = x.shape[dim] if block_size is None else block_size
    if out is None:
        plain = is_plain(x) and (signs is None or is_plain(signs))
        call = run if plain else _call
        return call(x, signs, scale, size, dim, transpose, impl)
    if is_transformed(x, signs) or is_transformed(out, None):
        raise RotationError(UNRECORDED)
    _operator_into(x, signs, scale, size, dim, transpose, impl, out)
    return out


def _call(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    if is_transformed(x, signs):
        return _transformed(x, signs, scale, size, dim, transpose, impl)
    return _operator(x, signs, scale, size, dim, transpose, impl)


NAME = "fastrot::hadamard_transform"
_ARGUMENTS = "Tensor x, Tensor? signs, float scale, SymInt size, int dim, bool transpose, str impl"

_tags = (torch.Tag.pt2_compliant_tag,)
torch.library.define(NAME, f"({_ARGUMENTS}) -> Tensor", tags=_tags)
torch.library.define(f"{NAME}_into", f"({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=_tags)
_operator = torch.ops.fastrot.hadamard_transform.default
_operator_into = torch.ops.fastrot.hadamard_transform_into.default


torch.library.impl(NAME, "default", run)
torch.library.impl(f"{NAME}_into", "default", run_into)


@torch.library.register_fake(NAME)
def _(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    check(x, signs, size, dim, impl)
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAME}_into")
def _(
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
    out: Tensor,
) -> None:
    check(x, signs, size, dim, impl)
    check_out(x, out)


class _Transform(torch.autograd.Function):
    """The operator once more, with all that ``torch.func`` asks for; it is linear in ``x``."""

    @staticmethod
    def forward(
        x: Tensor,
        signs: Tensor | None,
        scale: float,
        size: int,
        dim: int,
        transpose: bool,
        impl: str,
    ) -> Tensor:
        return _operator(x, signs, scale, size, dim, transpose, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, signs, *ctx.arguments = inputs
        if ctx.needs_input_grad[1]:
            raise RotationError(LEARNED_SIGNS)
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (signs,) = ctx.saved_tensors
        scale, size, dim, transpose, impl = ctx.arguments
        back = _call(grad, signs, scale, size, dim, not transpose, impl)
        return back, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, signs_tangent: Tensor | None, *_: None) -> Tensor:
        if signs_tangent is not None:
            raise RotationError(LEARNED_SIGNS)
        return _call(tangent, *ctx.saved_tensors, *ctx.arguments)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        signs: Tensor | None,
        scale: float,
        size: int,
        dim: int,
        transpose: bool,
        impl: str,
    ) -> tuple[Tensor, int]:
        of_x, of_signs, *_ = in_dims
        batch = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
        if signs is None or of_signs is None:
            return _call(batch, signs, scale, size, dim + 1, transpose, impl), 0
        pairs = zip(batch, signs.movedim(of_signs, 0), strict=True)
        each = [_call(v, d, scale, size, dim, transpose, impl) for v, d in pairs]
        return torch.stack(each), 0


# torch.compiler.disable would import the whole compiler; this does when it is called.
@torch._disable_dynamo
def _transformed(*arguments: Any) -> Tensor:
    """A compiler would trace the function down to the operator, which has no forward mode."""
    return _Transform.apply(*arguments)


UNRECORDED = (
    "out= can't be differentiated or transformed by torch.func; leave it out, detach the tensors, "
    "or call under torch.no_grad()"
)

LEARNED_SIGNS = (
    "signs can't be differentiated, they are constants of ±1; detach them, or multiply x by a "
    "learned diagonal yourself"
)

torch.library.register_vmap(NAME, _Transform.vmap)

_library = torch.library.Library("fastrot", "FRAGMENT")
_keys = torch._C.DispatchKey
# What reaches the kernels below for tensors on the CPU that no mode and no subclass looks at.
_PLAIN = (
    torch._C.DispatchKeySet(_keys.CPU) | torch._C.DispatchKeySet(_keys.AutogradCPU)
).raw_repr()


def _below_autograd(operator: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """Leave a call to what comes after autograd: another device, a mode, a subclass."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _recorded(
    keys: torch._C.DispatchKeySet,
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    """What ``register_autograd`` would make, without a second dispatch where none is needed."""
    if torch.is_grad_enabled() and (x.requires_grad or (signs is not None and signs.requires_grad)):
        return _Transform.apply(x, signs, scale, size, dim, transpose, impl)  # type: ignore[no-any-return]
    if keys.raw_repr() == _PLAIN:
        return run(x, signs, scale, size, dim, transpose, impl)
    return _below_autograd(_operator, keys, x, signs, scale, size, dim, transpose, impl)


def _recorded_into(
    keys: torch._C.DispatchKeySet,
    x: Tensor,
    signs: Tensor | None,
    scale: float,
    size: int,
    dim: int,
    transpose: bool,
    impl: str,
    out: Tensor,
) -> None:
    given = x, out, signs
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        raise RotationError(UNRECORDED)
    if not out.is_inference():  # an operator's write is unknown to autograd until it is told
        torch.autograd.graph.increment_version(out)
    if keys.raw_repr() == _PLAIN:
        return run_into(x, signs, scale, size, dim, transpose, impl, out)
    _below_autograd(_operator_into, keys, x, signs, scale, size, dim, transpose, impl, out)


_library.impl("hadamard_transform", _recorded, "Autograd", with_keyset=True)
_library.impl("hadamard_transform_into", _recorded_into, "Autograd", with_keyset=True)
