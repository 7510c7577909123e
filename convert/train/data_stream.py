"""Sequences that are made while they are trained on, for data larger than memory.

They are what reading the sources from the beginning gives, so a resumed run reads and tokenises
again what was trained on before, and goes on at the same sequence. Every process of a distributed
run reads everything and keeps its share.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.data.fingerprint import fingerprint_of
from adaconvert.train.cache import VERSION, tokenizer_facts
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed, pack, tensors_of
from adaconvert.train.data_lanes import (
    Lane,
    Tally,
    interleaved,
    lanes_of,
    opened_sources,
)
from adaconvert.train.data_packing import LEARNED, Piece
from adaconvert.train.data_report import passes_notes
from adaconvert.train.sources import MESSAGES, Opened

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


class Streamed:
    """The sequences of a run in order; a map-style data set that is cheap to walk forwards.

    Args:
        config: sources, lengths, budget and seed.
        sources: with their formats.
        folder: checkpoint whose tokenizer is used.

    Attributes:
        digest: sha256 over what they depend on; of files the sizes and both ends.
    """

    def __init__(self, config: FinetuneConfig, sources: list[Opened], folder: Path) -> None:
        self._config = config
        self._sources = sources
        self._folder = folder
        self._masked = any(source.format == MESSAGES for source in sources)
        self.digest = self._digest()
        self._first: Piece | None = None
        self._last: Piece | None = None
        self._begin()

    def __len__(self) -> int:
        return self._config.total_steps * self._config.step_sequences

    @property
    def sources(self) -> tuple[Tally, ...]:
        """Return what the whole run takes from each source."""
        self[len(self) - 1]
        return tuple(lane.counted() for lane in self._lanes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence, its labels and, when any is padded, its mask.

        Raises:
            DataError: a source is damaged, shorter than one sequence, or holds nothing to learn.
        """
        if index >= len(self):
            raise IndexError(index)
        piece = self._first if index == 0 and self._first is not None else self._reach(index)
        self._first = piece if index == 0 else self._first
        return tensors_of(piece.ids, self._kinds(piece))

    def _reach(self, index: int) -> Piece:
        if index < self._next - 1:
            self._begin()
        while self._next <= index or self._last is None:
            self._last = next(self._pieces)
            self._next += 1
        return self._last

    def _kinds(self, piece: Piece) -> Any:
        import numpy

        if piece.kinds is None and self._masked:
            return numpy.full(len(piece.ids), LEARNED, dtype=numpy.uint8)
        return piece.kinds

    def _begin(self) -> None:
        self._lanes = lanes_of(self._config, self._sources, self._folder)
        self._pieces = self._produced(self._lanes)
        self._next = 0
        self._last = None

    def _produced(self, lanes: list[Lane]) -> Iterator[Piece]:
        for index in interleaved([source.weight for source in self._config.data]):
            yield lanes[index].take()

    def _digest(self) -> str:
        data = [
            [
                fingerprint_of(source.where, split=source.split, commit=source.commit, whole=False),
                source.label,
            ]
            for source in self._sources
        ]
        facts = [VERSION, data, tokenizer_facts(self._folder)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


#: what a run trains on, in order.
Data = Packed | Streamed


def data_of(config: FinetuneConfig, folder: Path, *, progress: bool = False) -> Data:
    """Return the sequences of a run, of which the first is known to be there.

    Args:
        config: sources, lengths, budget and seed.
        folder: checkpoint whose tokenizer is used.
        progress: show a progress bar on a terminal.

    Raises:
        DataError, OptionError: as for `data.pack`.
    """
    if not config.reading.streaming:
        packed = pack(config, folder, progress=progress)
        for note in passes_notes(packed.sources):
            _log.warning("%s", note)
        return packed
    found = Streamed(config, opened_sources(config), folder)
    found[0]
    return found
