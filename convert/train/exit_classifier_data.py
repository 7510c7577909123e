"""Labelled texts and images a classifier's exits learn from, pass after pass in an order drawn.

Shapes: B examples of a batch, S tokens of its longest text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from adaconvert.data.images import Images, read_images, takes_images
from adaconvert.data.labels import LABEL_FIELD
from adaconvert.errors import DataError
from adaconvert.evaluate.classify import Labelled, read_labelled
from adaconvert.train.data_lanes import Tally

if TYPE_CHECKING:
    from torch import Tensor

    from adaconvert.train.config import FinetuneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One labelled source.

    Attributes:
        name: that outputs may carry.
        examples: texts or images with their classes.
        rows: those that are used, in order.
    """

    name: str
    examples: Labelled | Images
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unit(self) -> str:
        """Return what examples are called."""
        return self.examples.unit

    def tokens(self, row: int) -> int:
        """Return the tokens of a text, or the positions of an image."""
        if isinstance(self.examples, Images):
            return self.examples.processor.positions
        return len(self.examples.ids[row])

    def batch(self, rows: Sequence[int], device: Any) -> dict[str, Tensor]:
        """Return the arguments of the forward pass and "labels", [B]."""
        import torch

        labels = torch.tensor([self.examples.labels[row] for row in rows])
        if isinstance(self.examples, Images):
            fed = {"pixel_values": self.examples.pixels(rows)}
        else:
            fed = self.examples.padded(rows)
        return {name: value.to(device) for name, value in {**fed, "labels": labels}.items()}

    def digest(self) -> str:
        """Return one sha256 over what is used."""
        found = hashlib.sha256()
        for row in self.rows:
            label = self.examples.labels[row]
            if isinstance(self.examples, Images):
                found.update(self.examples.digests[row])
            else:
                found.update(numpy.array(self.examples.ids[row], dtype="<i8").tobytes())
            found.update(f" {label}\n".encode())
        if isinstance(self.examples, Images):
            found.update(self.examples.processor.facts().encode())
        return found.hexdigest()


@dataclass(slots=True, kw_only=True)
class Drawn:
    """Batches of all sources together; each pass reads every example once, in another order.

    Attributes:
        sources: where they come from, all of them of one unit.
        size: B.
        seed: of the orders.
        device: where batches go.
        seen: [source] examples given out.
        tokens: [source] tokens in them.
    """

    sources: tuple[Source, ...]
    size: int
    seed: int
    device: Any
    seen: list[int]
    tokens: list[int]

    @classmethod
    def of(cls, sources: Sequence[Source], size: int, seed: int, device: Any) -> Drawn:
        """Return the batches of some sources."""
        zeros = [0] * len(sources)
        return cls(
            sources=tuple(sources),
            size=size,
            seed=seed,
            device=device,
            seen=[*zeros],
            tokens=[*zeros],
        )

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches without end."""
        generator = numpy.random.Generator(numpy.random.Philox(self.seed))
        every = [(at, row) for at, source in enumerate(self.sources) for row in source.rows]
        left: list[tuple[int, int]] = []
        while True:
            while len(left) < self.size:
                left += [every[int(place)] for place in generator.permutation(len(every))]
            chosen, left = left[: self.size], left[self.size :]
            yield self._batch(chosen)

    def _batch(self, chosen: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        for at, row in chosen:
            self.seen[at] += 1
            self.tokens[at] += self.sources[at].tokens(row)
        return joined(self.sources, chosen).batch(range(len(chosen)), self.device)

    def tallies(self) -> tuple[Tally, ...]:
        """Return what was taken from each source."""
        return tuple(
            Tally(
                name=source.name,
                format="text" if isinstance(source.examples, Labelled) else "images",
                sequences=seen,
                tokens=tokens,
                learned=tokens,
                documents=min(seen, len(source)),
                passes=seen / len(source),
                cut=source.examples.cut if isinstance(source.examples, Labelled) else 0,
            )
            for source, seen, tokens in zip(self.sources, self.seen, self.tokens, strict=True)
        )


def joined(sources: Sequence[Source], chosen: Sequence[tuple[int, int]]) -> Source:
    """Return some examples as a source of their own.

    Args:
        sources: all of one unit.
        chosen: source and row of each.
    """
    first, picked = sources[0].examples, [(sources[at].examples, row) for at, row in chosen]
    rows = tuple(range(len(chosen)))
    if isinstance(first, Images):
        files = tuple(found.files[row] for found, row in picked if isinstance(found, Images))
        examples: Labelled | Images = Images(files=files, processor=first.processor)
    else:
        texts = [(found, row) for found, row in picked if isinstance(found, Labelled)]
        examples = Labelled(
            ids=tuple(found.ids[row] for found, row in texts),
            labels=tuple(found.labels[row] for found, row in texts),
            names=tuple(found.names[row] for found, row in texts),
            padding=first.padding,
        )
    return Source(name="", examples=examples, rows=rows)


def training_sources(config: FinetuneConfig, folder: Path, model: Any) -> tuple[Source, ...]:
    """Return what is trained on.

    Args:
        config: the fine-tune.
        folder: the checkpoint, which has tokenizer or image processor.
        model: its transformers config.

    Raises:
        DataError: missing or empty data, a missing field, or a label the model does not have.
    """
    count = len(config.data)
    return tuple(
        _source(
            source.where,
            source.label,
            *(config, folder, model),
            split=config.reading.split_of(index, count),
        )
        for index, source in enumerate(config.data)
    )


def held_out(config: FinetuneConfig, folder: Path, model: Any) -> tuple[Source, ...]:
    """Return what exits are measured on: of each source as much as `--valid-tokens` allows, drawn
    by the run's seed; arguments and errors as for `training_sources`."""
    asked = config.validation
    found = []
    for where, label in zip(asked.where, asked.labels, strict=True):
        source = _source(where, label, config, folder, model, split=asked.split)
        generator = numpy.random.Generator(numpy.random.Philox(config.seed))
        rows = [int(row) for row in generator.permutation(len(source))]
        sizes = numpy.cumsum([source.tokens(row) for row in rows])
        kept = max(1, int(numpy.searchsorted(sizes, asked.tokens, side="right")))
        found.append(Source(name=label, examples=source.examples, rows=tuple(sorted(rows[:kept]))))
    return tuple(found)


def _source(
    where: str, label: str, config: FinetuneConfig, folder: Path, model: Any, *, split: str | None
) -> Source:
    label_field = config.label_field or LABEL_FIELD
    examples: Labelled | Images
    if takes_images(str((model.architectures or [""])[0])):
        examples = read_images(
            where,
            *(folder, model),
            field=config.text_field,
            label_field=label_field,
            split=split,
        )
    else:
        examples = read_labelled(
            where,
            *(folder, model),
            field=config.text_field,
            label_field=label_field,
            split=split,
            length=config.seq_len,
        )
    if not examples.labels:
        raise DataError("holds nothing to learn from", where=label)
    return Source(name=label, examples=examples, rows=tuple(range(len(examples.labels))))


def steps_of(config: FinetuneConfig, sources: Sequence[Source]) -> int:
    """Return the optimiser steps of a fine-tune: those asked for, or as many as its tokens give at
    the mean length of an example."""
    if config.steps is not None:
        return config.steps
    tokens = sum(source.tokens(row) for source in sources for row in source.rows)
    mean = tokens / sum(map(len, sources))
    return math.ceil((config.tokens or 0) / (mean * config.batch_size * config.accumulate))
