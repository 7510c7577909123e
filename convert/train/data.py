"""Sequences of equal length in an order that depends on the seed alone.

Documents follow each other with the tokenizer's end-of-sequence token between them and are cut
every L tokens; conversations stay whole, and only what the assistant says is learned. Attention
crosses from one to the next in both, as in pretraining. When a source runs out it is shuffled again
and read once more.

Shapes: N sequences, L tokens each.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.progress import bar
from adaconvert.train.cache import TokenCache, key_of
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data_lanes import Lane, Tally, interleaved, lanes_of, opened_sources
from adaconvert.train.data_packing import LEARNED, PADDING
from adaconvert.train.sources import MESSAGES, Opened

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    Array = numpy.ndarray[Any, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences in the order they are trained on; a map-style data set.

    Attributes:
        ids: int32 [N, L].
        kinds: uint8 [N, L] as in `data_packing`; None when every token is learned.
        sources: what was taken from each, in the order given.
        digest: sha256 over the above arrays.
        cached: they were found, not made.
    """

    ids: Array
    kinds: Array | None
    sources: tuple[Tally, ...]
    digest: str
    cached: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def passes(self) -> tuple[float | None, ...]:
        """Return how often each source was read."""
        return tuple(tally.passes for tally in self.sources)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence, its labels and, when any is padded, its mask."""
        return tensors_of(self.ids[index], None if self.kinds is None else self.kinds[index])


def tensors_of(ids: Array, kinds: Array | None) -> dict[str, Tensor]:
    """Return what the model is fed; the first token is predicted by nothing.

    Args:
        ids: [L].
        kinds: [L], None when all are learned.
    """
    import torch

    from adaconvert.train.losses import IGNORED

    found = torch.from_numpy(ids.astype("int64"))
    labels = found.clone()
    fed = {"input_ids": found, "labels": labels}
    if kinds is not None:
        labels[torch.from_numpy(kinds != LEARNED)] = IGNORED
        fed["attention_mask"] = torch.from_numpy((kinds != PADDING).astype("int64"))
    labels[0] = IGNORED
    return fed


def digest_of(ids: Array, kinds: Array | None) -> str:
    """Return sha256 over the arrays."""
    digest = hashlib.sha256(ids.data)
    if kinds is not None:
        digest.update(kinds.data)
    return digest.hexdigest()


def pack(config: FinetuneConfig, folder: Path, *, progress: bool = False) -> Packed:
    """Return the sequences of a whole run, out of the cache when it has them.

    Args:
        config: sources, lengths, budget and seed.
        folder: checkpoint whose tokenizer is used.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: a source is missing, damaged, shorter than one sequence or holds nothing to
            learn, or the tokenizer does not fit the model or has no chat template.
        OptionError: sequences are longer than the model's positions.
    """
    sources = opened_sources(config)
    lanes = lanes_of(config, sources, folder)
    cache = TokenCache.default() if config.reading.cache else None
    key = None if cache is None else key_of(config, sources, folder)
    if cache is not None and key is not None:
        found = cache.load(key)
        if found is not None:
            ids, kinds, facts = found
            tallies = tuple(Tally(**tally) for tally in facts["sources"])
            _log.info("%d sequences found in the cache", len(ids))
            return Packed(
                ids=ids, kinds=kinds, sources=tallies, digest=facts["digest"], cached=True
            )
    packed = _packed(config, sources, lanes, progress)
    if cache is None or key is None:
        return packed
    facts = {"sources": [asdict(tally) for tally in packed.sources], "digest": packed.digest}
    stored = cache.store(key, packed.ids, packed.kinds, facts)
    return packed if stored is None else replace(packed, ids=stored[0], kinds=stored[1])


def _packed(
    config: FinetuneConfig, sources: Sequence[Opened], lanes: Sequence[Lane], progress: bool
) -> Packed:
    """Return the sequences, one source after the other: only one is in memory at a time."""
    import numpy

    weights = [source.weight for source in config.data]
    count = config.total_steps * config.step_sequences
    order = list(islice(interleaved(weights), count))
    shape = (count, config.seq_len)
    ids = numpy.empty(shape, dtype=numpy.int32)
    any_chat = any(source.format == MESSAGES for source in sources)
    kinds = numpy.full(shape, LEARNED, dtype=numpy.uint8) if any_chat else None
    tallies = []
    for index, lane in enumerate(lanes):
        places = [place for place, owner in enumerate(order) if owner == index]
        with bar(len(places), f"tokens {lane.tally.name}", "seq", enabled=progress) as shown:
            for place in places:
                piece = lane.take()
                ids[place] = piece.ids
                if kinds is not None and piece.kinds is not None:
                    kinds[place] = piece.kinds
                shown.update()
        tallies.append(lane.counted())
        lane.close()
    return Packed(ids=ids, kinds=kinds, sources=tuple(tallies), digest=digest_of(ids, kinds))
