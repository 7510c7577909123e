"""The proof that a plan loses nothing: sources used or dropped, targets made once, sizes that add
up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from adaconvert.dtypes import nbytes_of
from adaconvert.errors import AdaconvertError
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.planning.ops import Apply, Bytes, Expr, Gather, Piece, Plan, TargetTensor


class PlanError(AdaconvertError):
    """A plan is incomplete or contradicts itself: a bug in a method, never the user's fault."""


def pieces_of(expr: Expr) -> Iterator[Piece]:
    """Yield every piece of source bytes an expression reads, in order."""
    if isinstance(expr, Bytes):
        yield from expr.pieces
    elif isinstance(expr, Apply):
        for arg in expr.args:
            yield from pieces_of(arg)
    elif isinstance(expr, Gather):
        yield from expr.arg.pieces
        yield from pieces_of(expr.order)


def _check_bytes(expr: Expr, target: str, stored: Sequence[Mapping[str, TensorRef]]) -> None:
    if isinstance(expr, Apply):
        for arg in expr.args:
            _check_bytes(arg, target, stored)
    if isinstance(expr, Gather):
        _check_gather(expr, target)
        _check_bytes(expr.arg, target, stored)
        _check_bytes(expr.order, target, stored)
    if not isinstance(expr, Bytes):
        return
    total = sum(piece.total for piece in expr.pieces)
    if total != nbytes_of(expr.dtype, expr.shape):
        raise PlanError(
            "the pieces do not add up",
            where=target,
            expected=f"{nbytes_of(expr.dtype, expr.shape)} bytes",
            found=f"{total} bytes",
        )
    for piece in expr.pieces:
        ref = stored[piece.source].get(piece.tensor)
        if ref is None:
            raise PlanError(f"source {piece.source} has no tensor {piece.tensor!r}", where=target)
        end = piece.start + piece.stride * (piece.count - 1) + piece.nbytes
        if piece.start < 0 or end > ref.nbytes or ref.dtype != expr.dtype:
            raise PlanError(f"reads outside {piece.tensor!r} or as another dtype", where=target)


def _check_gather(expr: Gather, target: str) -> None:
    """Hold a reordering to its shapes."""
    size, rest = expr.arg.shape[expr.axis], expr.arg.shape[: expr.axis]
    taken, over = divmod(expr.shape[expr.axis], expr.runs)
    fits = (
        size % expr.runs == 0
        and over == 0
        and 0 <= expr.first <= expr.length - taken
        and (not expr.inverse or taken == expr.length)
        and expr.order.shape == (expr.length,)
        and expr.shape[: expr.axis] == rest
        and expr.shape[expr.axis + 1 :] == expr.arg.shape[expr.axis + 1 :]
        and len(expr.arg.pieces) == 1
        and expr.arg.pieces[0].count == 1
    )
    if not fits:
        raise PlanError("the order does not fit the tensor it reorders", where=target)


def _check_target(target: TargetTensor) -> None:
    if target.expr.shape != target.shape:
        raise PlanError(
            "wrong shape",
            where=target.name,
            expected=list(target.shape),
            found=list(target.expr.shape),
        )


def check_plan(plan: Plan, stored: Sequence[Mapping[str, TensorRef]]) -> None:
    """Hold the plan to its promises before a byte is written.

    Args:
        plan: the plan of one run.
        stored: for each source, its tensors by name.

    Raises:
        PlanError: a target is made twice or with the wrong size, or a source tensor is neither used
            nor dropped, or is both.
    """
    used: set[tuple[int, str]] = set()
    names: set[str] = set()
    for target in plan.targets:
        if target.name in names:
            raise PlanError("made twice", where=target.name)
        names.add(target.name)
        _check_target(target)
        _check_bytes(target.expr, target.name, stored)
        used.update((piece.source, piece.tensor) for piece in pieces_of(target.expr))
    dropped = {(drop.source, drop.tensor) for drop in plan.drops}
    for both in sorted(used & dropped):
        raise PlanError("both used and dropped", where=both[1])
    for index, tensors in enumerate(stored):
        for name in tensors:
            if (index, name) not in used and (index, name) not in dropped:
                raise PlanError(f"tensor of source {index} is neither used nor dropped", where=name)
