"""Shards whose data lie in their pages as the source's do: the kernel can move whole pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from adaconvert.io.layout import PAGE, ShardLayout, with_data_at
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.planning.ops import Bytes, Plan


def aligned(
    layouts: Sequence[ShardLayout], plan: Plan, stored: Sequence[Mapping[str, TensorRef]]
) -> tuple[ShardLayout, ...]:
    """Return the layouts, each header padded (by less than a page) for the most bytes to match.

    Args:
        layouts: shards of the plan.
        plan: says which bytes each target copies.
        stored: for each source, its tensors by name.
    """
    targets = {target.name: target for target in plan.targets}
    result = []
    for layout in layouts:
        votes: Counter[int] = Counter()
        for placed in layout.tensors:
            expr = targets[placed.name].expr
            if not isinstance(expr, Bytes) or expr.dtype != placed.dtype:
                continue
            at = placed.start - len(layout.header)
            for piece in expr.pieces:
                begin = stored[piece.source][piece.tensor].start + piece.start
                votes[(begin - at) % PAGE] += piece.total
                at += piece.total
        best = max(votes, key=lambda phase: (votes[phase], -phase)) if votes else 0
        result.append(with_data_at(layout, best) if votes and best % 8 == 0 else layout)
    return tuple(result)
