"""Tensors without data of which every element knows where it came from.

transformers' own conversions (merge experts, split a fused matrix, permute for RoPE) are run on
them while a checkpoint is traced. What they do is index arithmetic: along each of its dimensions
an element's place in its source is a linear function of its place in the traced tensor, and views,
transposes, slices and concatenations change the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastrot.errors import RotationError

aten = torch.ops.aten

Box = tuple[tuple[int, int], ...]
"""Start and end along every dimension."""


class UntraceableError(RotationError):
    """An operation that is no rearrangement of elements."""


@dataclass(frozen=True)
class Axis:
    """Place along one dimension of a source: ``start + Σ stride · place along dim``.

    Attributes:
        start: where all places are 0, counted from the piece's own box.
        strides: dimension of the traced tensor → stride, without zeros.
        mixed: the dimensions depend on each other in another way; ``strides`` names them only.
    """

    start: int
    strides: tuple[tuple[int, int], ...]
    mixed: bool = False

    def along(self, dim: int) -> int | None:
        """The stride along a dimension, None if it does not matter."""
        return dict(self.strides).get(dim)

    def renamed(self, names: dict[int, int]) -> Axis:
        """With other numbers for dimensions."""
        return replace(self, strides=tuple((names[dim], stride) for dim, stride in self.strides))


@dataclass(frozen=True)
class Piece:
    """A box of a traced tensor that came from one source.

    Attributes:
        source: its name.
        box: where it lies in the traced tensor.
        axes: one for every dimension of the source.
    """

    source: str
    box: Box
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(end - start for start, end in self.box)

    def renamed(self, box: Box, names: dict[int, int]) -> Piece:
        """With other numbers for the dimensions of the traced tensor."""
        return Piece(self.source, box, tuple(axis.renamed(names) for axis in self.axes))


class Traced(Tensor):
    """A tensor of pieces, for :func:`torch.Tensor` code that only rearranges."""

    pieces: tuple[Piece, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> Traced:
        """A source as it is."""
        axes = tuple(Axis(0, ((dim, 1),)) for dim in range(len(shape)))
        return _traced(shape, dtype, [Piece(name, tuple((0, n) for n in shape), axes)])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        rule = RULES.get(func.overloadpacket)
        if rule is None:
            raise UntraceableError(f"{func} is no rearrangement of elements")
        return rule(*args, **(kwargs or {}))


def _traced(shape: Sequence[int], dtype: torch.dtype, pieces: Iterable[Piece]) -> Traced:
    made: Traced = torch.Tensor._make_wrapper_subclass(Traced, tuple(shape), dtype=dtype)  # type: ignore[attr-defined]
    made.pieces = tuple(pieces)
    return made


def _same(x: Traced, *args: Any, **kwargs: Any) -> Traced:
    return _traced(x.shape, x.dtype, x.pieces)


def _permute(x: Traced, order: Sequence[int]) -> Traced:
    order = [dim % x.dim() for dim in order]
    names = {old: new for new, old in enumerate(order)}
    pieces = [p.renamed(tuple(p.box[old] for old in order), names) for p in x.pieces]
    return _traced([x.shape[old] for old in order], x.dtype, pieces)


def _transpose(x: Traced, a: int, b: int) -> Traced:
    order = list(range(x.dim()))
    order[a], order[b] = order[b], order[a]
    return _permute(x, order)


def _slice(
    x: Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Traced:
    if step != 1:
        raise UntraceableError(f"a slice in steps of {step}")
    dim %= x.dim()
    first, last, _ = slice(start, end).indices(x.shape[dim])
    pieces = []
    for piece in x.pieces:
        a, b = piece.box[dim]
        low, high = max(a, first), min(b, last)
        if low < high:
            cut = high - low < b - a
            box = (*piece.box[:dim], (low - first, high - first), *piece.box[dim + 1 :])
            axes = tuple(_moved(axis, dim, low - a, cut) for axis in piece.axes)
            pieces.append(Piece(piece.source, box, axes))
    shape = [*x.shape[:dim], max(0, last - first), *x.shape[dim + 1 :]]
    return _traced(shape, x.dtype, pieces)


def _moved(axis: Axis, dim: int, by: int, cut: bool) -> Axis:
    stride = axis.along(dim)
    if stride is None or not cut:
        return axis
    if axis.mixed:
        raise UntraceableError("a slice of what was permuted")
    return replace(axis, start=axis.start + by * stride)


def _split(x: Traced, size: int | Sequence[int], dim: int = 0) -> list[Traced]:
    length = x.shape[dim]
    if isinstance(size, int):
        size = [min(size, length - at) for at in range(0, length, size)]
    parts, at = [], 0
    for each in size:
        parts.append(_slice(x, dim, at, at + each))
        at += each
    return parts


def _chunk(x: Traced, chunks: int, dim: int = 0) -> list[Traced]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _unbind(x: Traced, dim: int = 0) -> list[Traced]:
    return [_select(x, dim, at) for at in range(x.shape[dim])]


def _cat(parts: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= parts[0].dim()
    pieces, at = [], 0
    for part in parts:
        if not isinstance(part, Traced):
            raise UntraceableError("a concatenation with a constant")
        for piece in part.pieces:
            start, end = piece.box[dim]
            box = (*piece.box[:dim], (start + at, end + at), *piece.box[dim + 1 :])
            pieces.append(replace(piece, box=box))
        at += part.shape[dim]
    shape = [*parts[0].shape[:dim], at, *parts[0].shape[dim + 1 :]]
    return _traced(shape, parts[0].dtype, pieces)


def _stack(parts: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([_unsqueeze(part, dim) for part in parts], dim)


def _unsqueeze(x: Traced, dim: int) -> Traced:
    dim %= x.dim() + 1
    names = {old: old + (old >= dim) for old in range(x.dim())}
    pieces = [p.renamed((*p.box[:dim], (0, 1), *p.box[dim:]), names) for p in x.pieces]
    return _traced([*x.shape[:dim], 1, *x.shape[dim:]], x.dtype, pieces)


def _squeeze(x: Traced, dim: int | Sequence[int]) -> Traced:
    for each in sorted((dim,) if isinstance(dim, int) else dim, reverse=True):
        if x.shape[each] == 1:
            x = _without(x, each % x.dim())
    return x


def _without(x: Traced, dim: int) -> Traced:
    """Without a dimension of one entry."""
    names = {old: old - (old > dim) for old in range(x.dim())}
    pieces = []
    for piece in x.pieces:
        axes = tuple(
            replace(axis, strides=tuple(s for s in axis.strides if s[0] != dim))
            for axis in piece.axes
        )
        box = (*piece.box[:dim], *piece.box[dim + 1 :])
        pieces.append(Piece(piece.source, piece.box, axes).renamed(box, names))
    return _traced([*x.shape[:dim], *x.shape[dim + 1 :]], x.dtype, pieces)


def _select(x: Traced, dim: int, at: int) -> Traced:
    dim, at = dim % x.dim(), at % x.shape[dim]
    return _without(_slice(x, dim, at, at + 1), dim)


def _view(x: Traced, shape: Sequence[int], *args: Any) -> Traced:
    wanted = list(shape)
    if -1 in wanted:
        wanted[wanted.index(-1)] = x.numel() // -prod(wanted)
    groups = _groups(x.shape, wanted)
    pieces = []
    for piece in x.pieces:
        box: list[tuple[int, int]] = [(0, 0)] * len(wanted)
        for old, new in groups:
            if len(old) == len(new) == 1:
                box[new[0]] = piece.box[old[0]]
            elif any(piece.box[dim] != (0, x.shape[dim]) for dim in old):
                raise UntraceableError("a view across pieces of different sources")
            else:
                for dim in new:
                    box[dim] = (0, wanted[dim])
        axes = tuple(_viewed(axis, groups, x.shape, wanted) for axis in piece.axes)
        pieces.append(Piece(piece.source, tuple(box), axes))
    return _traced(wanted, x.dtype, pieces)


_Groups = list[tuple[list[int], list[int]]]


def _groups(old: Sequence[int], new: Sequence[int]) -> _Groups:
    """Which dimensions become which: shortest runs of both with as many entries."""
    groups: _Groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] * (i < len(old)), [j] * (j < len(new))
        i, j = i + len(a), j + len(b)
        while prod(old[d] for d in a) != prod(new[d] for d in b):
            if prod(old[d] for d in a) < prod(new[d] for d in b):
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        if not a or not b:  # entries of one at the end belong to the last group
            groups[-1][0].extend(a)
            groups[-1][1].extend(b)
        else:
            groups.append((a, b))
    return groups


def _viewed(axis: Axis, groups: _Groups, old: Sequence[int], new: Sequence[int]) -> Axis:
    strides: list[tuple[int, int]] = []
    mixed = axis.mixed
    for before, after in groups:
        touched = {dim: stride for dim in before if (stride := axis.along(dim)) is not None}
        if not touched:
            continue
        # The stride of all these dimensions as one, if they are in order, one inside the other.
        unit = None
        inner = 1
        for dim in reversed(before):
            stride = touched.get(dim, 0)
            if old[dim] == 1:
                continue
            if unit is None:
                unit = stride
            elif stride != unit * inner:
                mixed = True
            inner *= old[dim]
        if len(before) == len(after) == 1:
            unit = touched[before[0]]
        size = 1
        for dim in reversed(after):
            if unit or mixed:
                strides.append((dim, (unit or 1) * size))
            size *= new[dim]
    return Axis(axis.start, tuple(sorted(strides)), mixed)


RULES: dict[Any, Callable[..., Any]] = {
    aten.transpose: _transpose,
    aten.t: lambda x: _transpose(x, 0, 1),
    aten.permute: _permute,
    aten.slice: _slice,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _chunk,
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.select: _select,
    aten.view: _view,
    aten.reshape: _view,
    aten._unsafe_view: _view,
    aten._reshape_alias: _view,
    aten.clone: _same,
    aten.contiguous: _same,
    aten.detach: _same,
    aten.alias: _same,
    aten._to_copy: _same,
}
"""What conversions do to tensors; anything else refuses the model."""
