"""The value of one expression, computed with numpy in float32; one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaconvert.dtypes import BY_NAME, numpy_dtype
from adaconvert.io.reader import read_bytes
from adaconvert.io.source import Source
from adaconvert.planning.arrays import from_float32, to_float32
from adaconvert.planning.functions import FUNCTIONS, SEVERAL
from adaconvert.planning.gather import gathered, gathered_parts
from adaconvert.planning.ops import (
    Apply,
    Bytes,
    Expr,
    Fitted,
    Gather,
    Init,
    Piece,
    TargetTensor,
)

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]


class Kept:
    """The last array that several tensors are parts of, kept while they are written in turn; one at
    a time."""

    def __init__(self) -> None:
        self._expr: Apply | None = None
        self._value: Array | None = None

    def value(self, expr: Apply, compute: Callable[[], Array]) -> Array:
        """Return the value of an expression: the kept one where it is that, else computed."""
        if self._value is None or expr != self._expr:
            # gone before there is another
            self._expr = self._value = None
            self._value, self._expr = compute(), expr
        return self._value


def _read_piece(piece: Piece, sources: Sequence[Source], dtype: str) -> Array:
    """Return the raw elements of one piece, flat."""
    import numpy

    source = sources[piece.source]
    ref = source.tensors[piece.tensor]
    if piece.count == 1:
        raw = read_bytes(source, ref, piece.start, piece.nbytes)
        return numpy.frombuffer(raw, dtype=numpy_dtype(dtype))
    item = BY_NAME[dtype].nbytes
    span = piece.stride * (piece.count - 1) + piece.nbytes
    flat = numpy.frombuffer(read_bytes(source, ref, piece.start, span), dtype=numpy_dtype(dtype))
    rows = numpy.lib.stride_tricks.as_strided(
        flat, (piece.count, piece.nbytes // item), (piece.stride, item), writeable=False
    )
    return numpy.ascontiguousarray(rows).reshape(-1)


def evaluate(
    expr: Expr, sources: Sequence[Source], fitted: Mapping[str, Array], kept: Kept | None = None
) -> Array:
    """Return the float32 value of an expression.

    Args:
        expr: any expression of a checked plan.
        sources: the opened checkpoints its pieces point into.
        fitted: the arrays of its `Fitted` leaves by key.
        kept: what the expressions before this one left; None to keep nothing.
    """
    import numpy

    if isinstance(expr, Bytes):
        parts = [to_float32(_read_piece(p, sources, expr.dtype), expr.dtype) for p in expr.pieces]
        flat = parts[0] if len(parts) == 1 else numpy.concatenate(parts)
        return flat.reshape(expr.shape)
    if isinstance(expr, Fitted):
        return fitted[expr.key].reshape(expr.shape)
    if isinstance(expr, Gather):
        return to_float32(gathered(expr, sources, fitted), expr.arg.dtype)
    if isinstance(expr, Init):
        if expr.kind == "identity":
            return numpy.eye(expr.shape[0], dtype=numpy.float32)
        value = dict(expr.params)["value"]
        return numpy.full(expr.shape, float(value), dtype=numpy.float32)
    assert isinstance(expr, Apply)
    if kept is not None and expr.fn in SEVERAL:
        return kept.value(expr, lambda: evaluate(expr, sources, fitted))
    args = [evaluate(arg, sources, fitted, kept) for arg in expr.args]
    return FUNCTIONS[expr.fn](args, dict(expr.params), expr.seed).reshape(expr.shape)


def stored_parts(
    target: TargetTensor,
    sources: Sequence[Source],
    fitted: Mapping[str, Array],
    kept: Kept | None = None,
) -> Iterator[Array]:
    """Yield what is written for a computed target: its bits in the target's dtype, in order.

    A concatenation is computed and yielded part by part, so that a tensor that holds all experts of
    a block takes no more memory than one of them. A reordered tensor is yielded as it is stored.
    Args as for `evaluate`.

    Raises:
        SourceError: the cast makes finite values infinite.
    """
    import numpy

    expr = target.expr
    if isinstance(expr, Gather) and expr.arg.dtype == target.dtype:
        yield from gathered_parts(expr, sources, fitted)
        return
    if isinstance(expr, Fitted) and not BY_NAME[target.dtype].is_float:
        yield numpy.ascontiguousarray(fitted[expr.key], dtype=numpy_dtype(target.dtype))
        return
    parts = expr.args if isinstance(expr, Apply) and expr.fn == "concat" else (expr,)
    for part in parts:
        values = evaluate(part, sources, fitted, kept)
        yield numpy.ascontiguousarray(from_float32(values, target.dtype, target.name))
