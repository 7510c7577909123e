"""Samples put together into sequences of equal length.

Text is one stream that is cut every L tokens, documents behind each other. Conversations stay
whole: each goes into the fullest of a few open sequences that still has room for it, and what stays
free is padding.

Shapes: L tokens of a sequence, T of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from adaconvert.errors import DataError
from adaconvert.train.data_reader import Sample

if TYPE_CHECKING:
    import numpy

    Ids = numpy.ndarray[Any, Any]

#: what a token of a sequence is: nothing, read only, or learned.
PADDING: Final = 0
CONTEXT: Final = 1
LEARNED: Final = 2
#: sequences that wait for more conversations; more waste less, and look further ahead.
_OPEN: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One sequence.

    Attributes:
        ids: int32 [L].
        kinds: uint8 [L] of `PADDING`, `CONTEXT` and `LEARNED`; None when all are learned.
        begun: samples whose first token is in it.
    """

    ids: Ids
    kinds: Ids | None
    begun: int


def cut(samples: Iterator[Sample | None], length: int, label: str) -> Iterator[Piece]:
    """Yield one stream of text in pieces.

    Args:
        samples: without end, None after each reading of the source.
        length: L.
        label: name of the source.

    Raises:
        DataError: the whole source is shorter than one sequence.
    """
    import numpy

    held = numpy.empty(0, dtype=numpy.int32)
    begun, some = 0, False
    for sample in samples:
        if sample is None:
            if not some:
                raise _too_short(label, length, len(held))
            continue
        held = numpy.concatenate([held, sample.ids])
        begun += 1
        while len(held) >= length:
            some = True
            yield Piece(ids=held[:length], kinds=None, begun=begun)
            held, begun = held[length:], 0


def _too_short(label: str, length: int, found: int) -> DataError:
    return DataError(
        "is shorter than one sequence",
        where=label,
        expected=f"{length} tokens (--seq-len)",
        found=f"{found} tokens",
        hint="Lower --seq-len or give more text.",
    )


# two with the same content are two
@dataclass(slots=True, eq=False)
class _Bin:
    used: int = 0
    samples: list[Sample] = field(default_factory=list)


def whole(samples: Iterator[Sample | None], length: int, padding: int) -> Iterator[Piece]:
    """Yield conversations, as many as fit behind each other; none of them twice in a sequence.

    Args:
        samples: none longer than `length`; None after each reading of the source.
        length: L.
        padding: id that stands where nothing is.
    """
    bins: list[_Bin] = []
    for sample in samples:
        if sample is None:
            yield from (_piece(each, length, padding) for each in bins)
            bins = []
            continue
        size = len(sample.ids)
        fitting = [each for each in bins if each.used + size <= length]
        if fitting:
            chosen = max(fitting, key=lambda each: each.used)
        else:
            if len(bins) == _OPEN:
                yield _piece(bins.pop(_fullest(bins)), length, padding)
            chosen = _Bin()
            bins.append(chosen)
        chosen.samples.append(sample)
        chosen.used += size
        if chosen.used == length:
            bins.remove(chosen)
            yield _piece(chosen, length, padding)


def _fullest(bins: list[_Bin]) -> int:
    return max(range(len(bins)), key=lambda index: bins[index].used)


def _piece(bin_: _Bin, length: int, padding: int) -> Piece:
    import numpy

    ids = numpy.full(length, padding, dtype=numpy.int32)
    kinds = numpy.full(length, PADDING, dtype=numpy.uint8)
    at = 0
    for sample in bin_.samples:
        end = at + len(sample.ids)
        ids[at:end] = sample.ids
        learned = True if sample.learned is None else sample.learned
        kinds[at:end] = numpy.where(learned, LEARNED, CONTEXT)
        at = end
    return Piece(ids=ids, kinds=kinds, begun=len(bin_.samples))
