"""What drafting from an exit costs, and the tokens a draft chooses among.

Letters: n drafted tokens, a the chance of each of being accepted, L blocks, k in front of the exit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.arch.projections import stock_spec
from adaconvert.data.text import Documents
from adaconvert.methods.sources import Described

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

_STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """What a round of a draft reads, in passes of the whole model.

    Attributes:
        token: for one drafted token: k blocks and an output matrix.
        check: to verify all of them at once.
        tokens: n.
    """

    token: float
    check: float
    tokens: int

    @property
    def round(self) -> float:
        """Return what a round costs, in tokens of the whole model."""
        return self.tokens * self.token + self.check

    def gained(self, accepted: float) -> float:
        """Return the tokens a round gives at chance a: 1 + a + ... + a^n."""
        return sum(accepted**power for power in range(self.tokens + 1))

    def break_even(self) -> float | None:
        """Return the chance of a token of being accepted above which drafting is faster than not
        to; None where none is."""
        if self.gained(1.0) <= self.round:
            return None
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.gained(middle) > self.round else (middle, high)
        return high


def drafting_of(item: Described, at: int, tokens: int, vocab: int | None, shares: bool) -> Drafting:
    """Return what drafting costs where reading weights takes the time, as at batch 1.

    Args:
        item: the model.
        at: k.
        tokens: n.
        vocab: tokens the draft chooses among, None for all.
        shares: verification goes on from what the draft computed; stock transformers computes the
            first blocks again.
    """
    spec, stored = stock_spec(item.spec), item.source.tensors
    blocks = [0] * spec.layers
    for tensor in spec.tensors:
        if tensor.layer is not None and tensor.name in stored:
            blocks[tensor.layer] += stored[tensor.name].nbytes
    heads = [t.name for t in spec.tensors if t.role in ("embed", "head") and t.name in stored]
    head = stored[heads[-1]].nbytes
    whole, first = sum(blocks) + head, sum(blocks[:at])
    own = head if vocab is None else head * vocab / max(spec.vocab, 1)
    return Drafting(
        token=(first + own) / whole,
        check=(whole - first if shares else whole) / whole,
        tokens=tokens,
    )


def words(found: Drafting, at: int) -> str:
    """Return in a sentence what drafting must reach."""
    share = f"a token drafted at exit {at} reads {found.token:.0%} of the weights a token reads"
    least = found.break_even()
    if least is None:
        return f"{share}, so drafting {found.tokens} at a time cannot be faster than plain decoding"
    return (
        f"{share}: drafting {found.tokens} at a time is faster than plain decoding only where each "
        f"is accepted with a chance above {least:.0%}, if reading weights is what takes the time"
    )


def most_frequent(
    documents: Documents | None, item: Described, count: int, always: Iterable[int]
) -> Array:
    """Return the ids a draft chooses among, int64 [n], ascending.

    Args:
        documents: whose most frequent tokens they are, lower ids first among equals; None for the
            first of the vocabulary, which tokenizers made by merging found first.
        item: the model with its tokenizer.
        count: n.
        always: ids that are among them in any case, such as the end of a text.

    Raises:
        DataError: the tokenizer is missing, or another model's.
    """
    import numpy

    from adaconvert.data.tokens import encode, load_tokenizer

    seen: Counter[int] = Counter()
    if documents is not None:
        tokenizer = load_tokenizer(item.source.root)
        for text in documents.texts:
            seen.update(encode(tokenizer, text))
    vocab = item.spec.vocab
    first = [number for number in dict.fromkeys(always) if 0 <= number < vocab][:count]
    rest = sorted(set(range(vocab)) - set(first), key=lambda number: (-seen[number], number))
    return numpy.sort(numpy.array([*first, *rest[: count - len(first)]], dtype=numpy.int64))
