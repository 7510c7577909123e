"""Each source on its way into sequences, what is taken from it, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.data.tokens import Limits, load_tokenizer, padding_id
from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data_packing import LEARNED, PADDING, Piece, cut, whole
from adaconvert.train.data_reader import ChatEncoder, Encoder, Reader, TextEncoder
from adaconvert.train.sources import MESSAGES, Opened, open_source


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was taken from one source.

    Attributes:
        name: of the source.
        format: "text" or "messages".
        sequences: taken.
        tokens: in them, padding left out.
        learned: of these, the ones whose prediction counts.
        documents: different documents or conversations that were begun.
        passes: how often the source was read; None while it is not known how long it is.
        cut: conversations too long for a sequence, of those looked at.
        left_out: blank texts and conversations without an answer, of those looked at.
        commit: of a hub data set, None when it is not known or the source is no such.
        pinned: the source is no hub data set, or was given with a revision.
    """

    name: str
    format: str
    sequences: int = 0
    tokens: int = 0
    learned: int = 0
    documents: int = 0
    passes: float | None = 0.0
    cut: int = 0
    left_out: int = 0
    commit: str | None = None
    pinned: bool = True


class Lane:
    """One source on its way into sequences.

    Args:
        source: what is read.
        config: lengths, budget and seed.
        index: of the source.
        tokenizer: of transformers.
        limits: of the model.
        label: name of the checkpoint.
    """

    def __init__(
        self,
        source: Opened,
        config: FinetuneConfig,
        index: int,
        tokenizer: Any,
        limits: Limits,
        label: str,
    ) -> None:
        self.tally = Tally(
            name=source.label, format=source.format, commit=source.commit, pinned=source.pinned
        )
        self._begun = 0
        length = config.seq_len
        is_chat = source.format == MESSAGES
        encoder: Encoder = (
            ChatEncoder(tokenizer, limits, length, label)
            if is_chat
            else TextEncoder(tokenizer, limits)
        )
        self._reader = Reader(
            source, encoder, seed=config.seed + index, buffer=config.reading.shuffle_buffer
        )
        samples = self._reader.samples()
        self._pieces: Iterator[Piece] = (
            whole(samples, length, padding_id(tokenizer, limits.vocab))
            if is_chat
            else cut(samples, length, escape(source.label))
        )

    def take(self) -> Piece:
        """Return the next sequence.

        Raises:
            DataError: the source is damaged, too short, or holds nothing to learn.
        """
        piece = next(self._pieces)
        self._begun += piece.begun
        kinds, size = piece.kinds, len(piece.ids)
        self.tally.sequences += 1
        self.tally.tokens += size if kinds is None else int((kinds != PADDING).sum())
        self.tally.learned += size if kinds is None else int((kinds == LEARNED).sum())
        return piece

    def close(self) -> None:
        """Let go of what was read."""
        self._pieces = iter(())

    def counted(self) -> Tally:
        """Return what was taken so far."""
        looked = self._reader.looked
        usable = looked.rows - looked.left_out if looked.whole else 0
        tally = self.tally
        tally.cut, tally.left_out = looked.cut, looked.left_out
        tally.documents = min(self._begun, usable) if looked.whole else self._begun
        tally.passes = round(self._begun / usable, 3) if usable else None
        return tally


def opened_sources(config: FinetuneConfig) -> list[Opened]:
    """Return the sources of a fine-tune, each with its format.

    Raises:
        DataError: one is missing or damaged, or its format cannot be told.
        OptionError: formats or splits do not fit the number of sources.
    """
    reading, count = config.reading, len(config.data)
    return [
        open_source(
            source.where,
            source.label,
            fields=(config.text_field, reading.messages_field),
            format_=reading.format_of(index, count),
            split=reading.split_of(index, count),
            streaming=reading.streaming,
        )
        for index, source in enumerate(config.data)
    ]


def lanes_of(config: FinetuneConfig, sources: Sequence[Opened], folder: Path) -> list[Lane]:
    """Return the lanes of all sources, at their beginning.

    Args:
        config: lengths, budget and seed.
        sources: as `opened_sources` returns them.
        folder: checkpoint whose tokenizer is used.

    Raises:
        DataError: the tokenizer cannot be loaded, or there are conversations and no chat template.
        OptionError: sequences are longer than the model's positions.
    """
    limits = Limits.of(folder)
    if limits.positions and config.seq_len > limits.positions:
        raise OptionError(
            "is longer than the model can read",
            where="--seq-len",
            expected=f"at most {limits.positions}",
            found=config.seq_len,
        )
    tokenizer = load_tokenizer(folder)
    return [
        Lane(source, config, index, tokenizer, limits, folder.name)
        for index, source in enumerate(sources)
    ]


def interleaved(weights: Sequence[float]) -> Iterator[int]:
    """Yield without end the source of each sequence: always the one furthest behind its share."""
    total = sum(weights)
    taken = [0] * len(weights)
    place = 0
    while True:
        place += 1
        due = [weight / total * place - had for weight, had in zip(weights, taken, strict=True)]
        chosen = due.index(max(due))
        taken[chosen] += 1
        yield chosen
