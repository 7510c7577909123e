"""Elements of stored tensors in another order, moved as bits: no dtype rounds, no NaN changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaconvert.dtypes import BY_NAME, numpy_dtype
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.io.reader import read_bytes
from adaconvert.io.source import Source
from adaconvert.planning.accounting import PlanError
from adaconvert.planning.ops import Bytes, Fitted, Gather

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: bytes reordered at a time.
BLOCK = 16 << 20


def gathered(expr: Gather, sources: Sequence[Source], fitted: Mapping[str, Array]) -> Array:
    """Return the reordered elements as stored (bf16 as uint16), of shape `expr.shape`."""
    import numpy

    parts = list(gathered_parts(expr, sources, fitted))
    whole = parts[0] if len(parts) == 1 else numpy.concatenate(parts)
    return whole.reshape(expr.shape)


def gathered_parts(
    expr: Gather, sources: Sequence[Source], fitted: Mapping[str, Array]
) -> Iterator[Array]:
    """Yield the reordered elements as stored, some rows at a time, in order.

    Args:
        expr: a checked expression.
        sources: the opened checkpoints its pieces point into.
        fitted: the arrays of fitted orders by key.

    Raises:
        SourceError: a stored order is no permutation.
    """
    import numpy

    taken = _positions(expr, order_of(expr.order, sources, fitted))
    if expr.axis == 0 and 8 * len(taken) < expr.arg.shape[0]:
        yield numpy.concatenate([_rows(expr.arg, int(row), 1, sources) for row in taken])
        return
    if expr.axis == 0:
        rows = _rows(expr.arg, 0, expr.arg.shape[0], sources)
        step = max(1, BLOCK // max(1, rows[:1].nbytes))
        for start in range(0, len(taken), step):
            yield rows[taken[start : start + step]]
        return
    step = max(1, BLOCK // max(1, expr.arg.shape[1] * BY_NAME[expr.arg.dtype].nbytes))
    for start in range(0, expr.arg.shape[0], step):
        rows = _rows(expr.arg, start, min(step, expr.arg.shape[0] - start), sources)
        yield rows.take(taken, axis=1)


def _positions(expr: Gather, order: Array) -> Array:
    """Return, for each position of the result along the axis, the element it holds."""
    import numpy

    if expr.inverse:
        order = inverse(order)
    count = expr.shape[expr.axis] // expr.runs
    one = order[expr.first : expr.first + count]
    return numpy.concatenate([one + run * expr.length for run in range(expr.runs)])


def _rows(arg: Bytes, start: int, count: int, sources: Sequence[Source]) -> Array:
    """Return `count` rows of a stored tensor from row `start` on, as stored."""
    import numpy

    piece = arg.pieces[0]
    source = sources[piece.source]
    width = piece.nbytes // arg.shape[0]
    raw = read_bytes(
        source, source.tensors[piece.tensor], piece.start + start * width, count * width
    )
    return numpy.frombuffer(raw, dtype=numpy_dtype(arg.dtype)).reshape(count, *arg.shape[1:])


def order_of(expr: Fitted | Bytes, sources: Sequence[Source], fitted: Mapping[str, Array]) -> Array:
    """Return an order as int64, once it is known to be a permutation.

    Raises:
        SourceError: a stored one is not.
        PlanError: a fitted one is not.
    """
    if isinstance(expr, Fitted):
        order: Array = fitted[expr.key].astype("int64")
        if not is_permutation(order, expr.shape[0]):
            raise PlanError("no permutation", where=expr.key)
        return order
    stored: Array = _rows(expr, 0, expr.shape[0], sources).astype("int64")
    if not is_permutation(stored, expr.shape[0]):
        piece = expr.pieces[0]
        raise SourceError(
            "is no permutation of the neurons, so they cannot be put back",
            where=f"{escape(sources[piece.source].label)}: tensor '{escape(piece.tensor)}'",
            expected=f"each of 0 to {expr.shape[0] - 1} once",
            hint="The checkpoint is damaged; convert the dense model again.",
        )
    return stored


def is_permutation(order: Array, length: int) -> bool:
    """Return whether `order` holds each of 0 .. length - 1 once."""
    import numpy

    if order.shape != (length,) or int(order.min()) < 0 or int(order.max()) >= length:
        return False
    return bool((numpy.bincount(order, minlength=length) == 1).all())


def inverse(order: Array) -> Array:
    """Return the permutation that undoes another."""
    import numpy

    undone = numpy.empty_like(order)
    undone[order] = numpy.arange(len(order))
    return undone
