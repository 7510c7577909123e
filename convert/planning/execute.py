"""Run a plan: shard by shard into a staging folder, without knowing any method or model family.

Copies go from file to file inside the kernel while a worker thread hashes and scans each source
tensor once; a tensor that is a copy of a whole source tensor reuses that digest, however often it
is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.io.commit import Staging
from adaconvert.io.copying import FdCache, Span
from adaconvert.io.digest import DigestPool
from adaconvert.io.source import Source
from adaconvert.io.writer import ShardLayout, ShardRecord
from adaconvert.planning.accounting import pieces_of
from adaconvert.planning.evaluate import Kept, stored_parts
from adaconvert.planning.ops import Bytes, Plan, TargetTensor
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What a run wrote and read.

    Attributes:
        shards: every shard by file name, with the sha256 of each of its tensors.
        sources: for each source, one sha256 over names and hashes of all its tensors.
        nonfinite: for each tensor with NaN or infinities (only when those are allowed), a sentence.
    """

    shards: dict[str, ShardRecord]
    sources: tuple[str, ...]
    nonfinite: tuple[str, ...]


def copied_bytes(target: TargetTensor) -> Bytes | None:
    """Return what a target is a copy of, or None when its bytes are computed."""
    if isinstance(target.expr, Bytes) and target.expr.dtype == target.dtype:
        return target.expr
    return None


def spans_of(expr: Bytes, sources: Sequence[Source], files: FdCache) -> Iterator[Span]:
    """Yield the byte ranges of open source files an expression is the concatenation of.

    Each is to be used before the next is asked for: `files` keeps only a few open.
    """
    for piece in expr.pieces:
        source = sources[piece.source]
        ref = source.tensors[piece.tensor]
        fd = files.shard(source, ref.file)
        yield Span(fd, ref.start + piece.start, piece.nbytes, piece.stride, piece.count)


def execute(
    plan: Plan,
    sources: Sequence[Source],
    staging: Staging,
    layouts: Sequence[ShardLayout],
    *,
    fitted: Mapping[str, Array],
    allow_nonfinite: bool = False,
    progress: bool = False,
) -> Execution:
    """Return once every shard of the plan lies complete and synced in the staging folder.

    Args:
        plan: a checked plan.
        sources: its opened checkpoints, in the plan's order.
        staging: where shards go; shards it already holds complete are not written again.
        layouts: the shards of the plan.
        fitted: float32 arrays of the plan's `Fitted` leaves.
        allow_nonfinite: accept NaN and infinities in source tensors.
        progress: show a bar of bytes written.

    Raises:
        SourceError: a source tensor is not finite, a cast overflows, or a source changed.
        ResourceError: the disk is full or fails.
    """
    targets = {target.name: target for target in plan.targets}
    done = staging.completed_shards(layouts)
    left = [layout for layout in layouts if layout.file not in done]
    kept = Kept()
    with (
        DigestPool(sources, allow_nonfinite=allow_nonfinite) as pool,
        FdCache() as files,
        bar(sum(layout.nbytes for layout in layouts), "writing", "B", enabled=progress) as shown,
    ):
        shown.update(sum(record.nbytes for record in done.values()))
        pool.prefetch(_first_uses(plan))
        for layout in left:
            with staging.shard(layout) as shard:
                copies: dict[str, Bytes] = {}
                for placed in layout.tensors:
                    target = targets[placed.name]
                    copied = copied_bytes(target)
                    if copied is None:
                        for bits in stored_parts(target, sources, fitted, kept):
                            shard.write(target.name, bits)
                    else:
                        # piece by piece: a descriptor is good until a few other files are used
                        for span in spans_of(copied, sources, files):
                            shard.copy(target.name, [span])
                        copies[target.name] = copied
                    shown.update(placed.nbytes)
                shard.finish(_digests(pool, copies))
        digests = tuple(pool.source_digest(index) for index in range(len(sources)))
        records = staging.records()
        odd = pool.nonfinite()
    found = tuple(
        f"non-finite values accepted: {count.bad_count} in '{name}' of source {index}"
        for (index, name), count in sorted(odd.items())
    )
    return Execution(shards=records, sources=digests, nonfinite=found)


def _digests(pool: DigestPool, copies: Mapping[str, Bytes]) -> Callable[[], dict[str, str]]:
    """Return what waits for the hashes of a shard's copies; they are queued at once."""
    for copy in copies.values():
        pool.prefetch_ranges(copy.pieces)
    return lambda: {name: pool.digest_ranges(copy.pieces) for name, copy in copies.items()}


def _first_uses(plan: Plan) -> Iterable[tuple[int, str]]:
    """Return every source tensor in the order the targets first need it."""
    uses = [(p.source, p.tensor) for t in plan.targets for p in pieces_of(t.expr)]
    return list(dict.fromkeys(uses))
