"""Text packed into sequences of equal length, in an order that depends on the seed alone.

Documents follow each other with the tokenizer's end-of-sequence token between them and are cut
every L tokens; attention crosses from one document to the next, as in pretraining. When a source
runs out it is shuffled again and read once more.

Shapes: N sequences, L tokens each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.data.text import Documents, read_documents
from adaconvert.data.tokens import Limits, encode, load_tokenizer
from adaconvert.errors import DataError, OptionError
from adaconvert.io.names import escape
from adaconvert.progress import bar
from adaconvert.train.config import DataSource, FinetuneConfig

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences in the order they are trained on; a map-style data set.

    Attributes:
        ids: int32 [N, L].
        passes: how often each source was read, in the order given.
        digest: sha256 over the ids.
    """

    ids: numpy.ndarray[Any, Any]
    passes: tuple[float, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sequence and its labels; the first token is predicted by nothing."""
        import torch

        from adaconvert.train.losses import IGNORED

        ids = torch.from_numpy(self.ids[index].astype("int64"))
        labels = ids.clone()
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels}


def pack(config: FinetuneConfig, folder: Path, *, progress: bool = False) -> Packed:
    """Return the sequences of a whole run.

    Args:
        config: sources, lengths, budget and seed.
        folder: checkpoint whose tokenizer is used.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: a source is missing, damaged or shorter than one sequence, or the tokenizer does
            not fit the model.
        OptionError: sequences are longer than the model's positions.
    """
    import numpy

    limits = Limits.of(folder)
    if limits.positions and config.seq_len > limits.positions:
        raise OptionError(
            "is longer than the model can read",
            where="--seq-len",
            expected=f"at most {limits.positions}",
            found=config.seq_len,
        )
    tokenizer = load_tokenizer(folder)
    order = _interleaved(
        [source.weight for source in config.data],
        config.total_steps * config.batch_size * config.accumulate,
    )
    ids = numpy.empty((len(order), config.seq_len), dtype=numpy.int32)
    passes = []
    for index, source in enumerate(config.data):
        places = [place for place, owner in enumerate(order) if owner == index]
        reader = _Reader(source, config, tokenizer, limits, seed=config.seed + index)
        with bar(len(places), f"tokens {source.label}", "seq", enabled=progress) as shown:
            for place, sequence in zip(places, reader.sequences(), strict=False):
                ids[place] = sequence
                shown.update()
        passes.append(round(reader.passes, 3))
    return Packed(ids=ids, passes=tuple(passes), digest=hashlib.sha256(ids.tobytes()).hexdigest())


def _interleaved(weights: Sequence[float], count: int) -> list[int]:
    """Return the source of each sequence: always the one furthest behind its share."""
    total = sum(weights)
    taken = [0] * len(weights)
    order = []
    for place in range(count):
        due = [
            weight / total * (place + 1) - had for weight, had in zip(weights, taken, strict=True)
        ]
        chosen = due.index(max(due))
        taken[chosen] += 1
        order.append(chosen)
    return order


class _Reader:
    """Reads one source over and over, each time in another order.

    Attributes:
        passes: how often the source has been read so far.
    """

    def __init__(
        self, source: DataSource, config: FinetuneConfig, tokenizer: Any, limits: Limits, seed: int
    ) -> None:
        self.passes = 0.0
        self._documents: Documents = read_documents(source.where, field=config.text_field)
        self._label = escape(source.label)
        self._length = config.seq_len
        self._tokenizer = tokenizer
        self._limits = limits
        self._seed = seed
        self._known: dict[int, numpy.ndarray[Any, Any]] = {}

    def sequences(self) -> Iterator[numpy.ndarray[Any, Any]]:
        """Yield int32 [L] for ever.

        Raises:
            DataError: the whole source is shorter than one sequence.
        """
        import numpy

        held = numpy.empty(0, dtype=numpy.int32)
        for document, passes in self._stream():
            held = numpy.concatenate([held, document])
            while len(held) >= self._length:
                self.passes = passes
                yield held[: self._length]
                held = held[self._length :]
            if passes >= 1 and not self.passes:
                raise DataError(
                    "is shorter than one sequence",
                    where=self._label,
                    expected=f"{self._length} tokens (--seq-len)",
                    found=f"{len(held)} tokens",
                    hint="Lower --seq-len or give more text.",
                )

    def _stream(self) -> Iterator[tuple[numpy.ndarray[Any, Any], float]]:
        """Yield documents as ids, and how often the source has been read after each."""
        import numpy

        count = len(self._documents)
        generator = numpy.random.Generator(numpy.random.Philox(self._seed))
        done = 0
        while True:
            for index in generator.permutation(count):
                done += 1
                yield self._ids(int(index)), done / count

    def _ids(self, index: int) -> numpy.ndarray[Any, Any]:
        import numpy

        if index not in self._known:
            ids = encode(self._tokenizer, self._documents.texts[index])
            self._limits.check(ids, self._tokenizer, self._documents.names[index])
            end = getattr(self._tokenizer, "eos_token_id", None)
            if isinstance(end, int) and (not ids or ids[-1] != end):
                ids.append(end)
            self._known[index] = numpy.array(ids, dtype=numpy.int32)
        return self._known[index]
