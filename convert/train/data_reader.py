"""Sources as token ids, over and over, each time in another order that the seed decides.

Shapes: T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.data.tokens import Limits, encode
from adaconvert.errors import DataError
from adaconvert.io.names import escape
from adaconvert.layerwise.quiet import quiet
from adaconvert.train.chat import Chat
from adaconvert.train.sources import MESSAGES, Opened, Raw

if TYPE_CHECKING:
    import numpy

    Ids = numpy.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A document or conversation.

    Attributes:
        ids: int32 [T].
        learned: bool [T], the tokens whose prediction counts; None when all do.
    """

    ids: Ids
    learned: Ids | None = None


@dataclass(slots=True, kw_only=True)
class Looked:
    """What was seen while reading a source for the first time.

    Attributes:
        rows: all of them.
        cut: conversations longer than a sequence.
        left_out: blank texts, and conversations in which no answer is left to learn.
        whole: the source was read to its end, so the above are all of it.
    """

    rows: int = 0
    cut: int = 0
    left_out: int = 0
    whole: bool = False


class TextEncoder:
    """Text as the tokenizer cuts it, closed by its end-of-sequence token."""

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits

    def __call__(self, raw: Raw, looked: Looked) -> Sample | None:
        """Return the sample; it always holds something to learn.

        Raises:
            DataError: the tokenizer gives ids the model does not have.
        """
        import numpy

        ids = encode(self._tokenizer, str(raw.value))
        self._limits.check(ids, self._tokenizer, raw.name)
        end = getattr(self._tokenizer, "eos_token_id", None)
        if isinstance(end, int) and (not ids or ids[-1] != end):
            ids.append(end)
        return Sample(ids=numpy.array(ids, dtype=numpy.int32))


class ChatEncoder:
    """Conversations as the chat template renders them, cut to one sequence."""

    def __init__(self, tokenizer: Any, limits: Limits, length: int, label: str) -> None:
        self._chat = Chat(tokenizer, label)
        self._tokenizer = tokenizer
        self._limits = limits
        self._length = length

    def __call__(self, raw: Raw, looked: Looked) -> Sample | None:
        """Return the sample, None when nothing is left to learn once it is cut.

        Raises:
            DataError: the template refuses it, or the tokenizer does not fit the model.
        """
        import numpy

        messages = raw.value if isinstance(raw.value, list) else []
        with quiet():
            ids, learned = self._chat.encode(messages, raw.name)
        self._limits.check(ids, self._tokenizer, raw.name)
        looked.cut += len(ids) > self._length
        learned = learned[: self._length]
        # nothing predicts the first token
        if not any(learned[1:]):
            looked.left_out += 1
            return None
        return Sample(
            ids=numpy.array(ids[: self._length], dtype=numpy.int32),
            learned=numpy.array(learned, dtype=bool),
        )


Encoder = Callable[[Raw, Looked], Sample | None]


class Reader:
    """Reads one source without end.

    Attributes:
        looked: what the first reading has seen so far.
    """

    def __init__(self, source: Opened, encoder: Encoder, *, seed: int, buffer: int) -> None:
        self.source = source
        self.looked = Looked()
        self._encoder = encoder
        self._seed = seed
        self._buffer = buffer

    def samples(self) -> Iterator[Sample | None]:
        """Yield samples, and None after each time the whole source was read.

        Raises:
            DataError: the source is damaged, or holds nothing to learn.
        """
        produce = self._streamed() if self.source.streaming else self._mapped()
        some = False
        for sample in produce:
            some = some or sample is not None
            if not some:
                raise self._empty()
            yield sample

    def _mapped(self) -> Iterator[Sample | None]:
        """Yield samples of rows that are in memory, in a new order each time."""
        import numpy

        raws = list(self._counted())
        self.looked.whole = True
        generator = numpy.random.Generator(numpy.random.Philox(self._seed))
        known: dict[int, Sample | None] = {}
        while True:
            for place in generator.permutation(len(raws)):
                index = int(place)
                if index not in known:
                    known[index] = self._encoder(raws[index], self.looked)
                found = known[index]
                if found is not None:
                    yield found
            yield None

    def _streamed(self) -> Iterator[Sample | None]:
        """Yield samples of rows as they are read, shuffled among those in a buffer."""
        import numpy

        looked = self.looked
        time = 0
        while True:
            seeds = numpy.random.SeedSequence([self._seed, time])
            generator = numpy.random.Generator(numpy.random.Philox(seeds))
            for raw in shuffled(self._counted(looked), self._buffer, generator):
                found = self._encoder(raw, looked)
                if found is not None:
                    yield found
            self.looked.whole = True
            # what later readings see is known
            looked = Looked()
            time += 1
            yield None

    def _counted(self, looked: Looked | None = None) -> Iterator[Raw]:
        looked = self.looked if looked is None else looked
        for raw in self.source.rows():
            looked.rows += 1
            if raw.value is None:
                looked.left_out += 1
            else:
                yield raw

    def _empty(self) -> DataError:
        rows = self.looked.rows
        if self.source.format == MESSAGES:
            return DataError(
                "holds no conversation with an answer to learn",
                where=escape(self.source.label),
                found=f"{rows} conversations, {self.looked.cut} of them longer than a sequence",
            )
        found = f"{rows} blank documents" if rows else "no document"
        return DataError("holds no text", where=escape(self.source.label), found=found)


def shuffled(raws: Iterator[Raw], size: int, generator: numpy.random.Generator) -> Iterator[Raw]:
    """Yield the same rows in another order; at most `size` of them are held."""
    held: list[Raw] = []
    for raw in raws:
        if len(held) < size:
            held.append(raw)
            continue
        place = int(generator.integers(size))
        yield held[place]
        held[place] = raw
    for index in generator.permutation(len(held)):
        yield held[int(index)]
