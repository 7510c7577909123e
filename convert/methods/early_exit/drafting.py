"""What drafting from an exit costs, and the tokens a draft chooses among.

Letters: n drafted tokens, a the chance of each of being accepted, L blocks, k in front of the exit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaconvert.arch.projections import stock_spec
from adaconvert.data.text import Documents
from adaconvert.methods.early_exit.config import SHARED
from adaconvert.methods.sources import Described

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

_STEPS = 60
#: roles of a feed-forward network's matrices.
_NETWORK = ("gate", "up", "down", "gate_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """What a round of a draft reads, in passes of the whole model.

    Attributes:
        token: for one drafted token: k blocks, what the exit has of its own and an output matrix.
        check: to verify all of them at once: the blocks below the exit once more, for the last
            drafted token, and the rest of the model.
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


def drafting_of(
    item: Described, at: int, tokens: int, vocab: int | None, head: str = SHARED
) -> Drafting:
    """Return what drafting costs where reading weights takes the time, as at batch 1.

    Args:
        item: the model.
        at: k.
        tokens: n.
        vocab: tokens the draft chooses among, None for all.
        head: kind of the exit.
    """
    spec, stored = stock_spec(item.spec), item.source.tensors
    blocks, networks = [0] * spec.layers, [0] * spec.layers
    for tensor in spec.tensors:
        if tensor.layer is not None and tensor.name in stored:
            blocks[tensor.layer] += stored[tensor.name].nbytes
            if tensor.role in _NETWORK:
                networks[tensor.layer] += stored[tensor.name].nbytes
    ends = [t.name for t in spec.tensors if t.role in ("embed", "head") and t.name in stored]
    end = stored[ends[-1]].nbytes
    whole = sum(blocks) + end
    own = end if vocab is None else end * vocab / max(spec.vocab, 1)
    own += networks[at - 1] if head in ("mlp", "full") else 0
    own += blocks[-1] if head in ("layer", "full") else 0
    own += end * spec.hidden / max(spec.vocab, 1) if head == "affine" else 0
    return Drafting(token=(sum(blocks[:at]) + own) / whole, check=1.0, tokens=tokens)


def words(found: Drafting, at: int) -> str:
    """Return in a sentence what drafting must reach."""
    share = f"a token drafted at exit {at} reads {found.token:.0%} of the weights a token reads"
    least, single = found.break_even(), replace(found, tokens=1).break_even()
    if single is None:
        return f"{share}, so drafting cannot be faster than plain decoding"
    several = "" if least is None or found.tokens == 1 else f" ({least:.0%} for {found.tokens})"
    return (
        f"{share}: drafting one at a time is faster than plain decoding only where it is accepted "
        f"with a chance above {single:.0%}{several}, if reading weights is what takes the time; "
        f"`adaconvert evaluate` measures how often an exit agrees"
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
