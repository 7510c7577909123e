"""Accuracy of classifiers on labelled texts, or on labelled images.

Shapes: D texts or images, B of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adaconvert.data.labels import check_single_label, label_of
from adaconvert.data.rows import iter_rows
from adaconvert.data.text import text_of
from adaconvert.data.tokens import Limits, encode, load_tokenizer, padding_id
from adaconvert.errors import DataError, SourceError
from adaconvert.evaluate.compute import Tally
from adaconvert.evaluate.perplexity import Variant
from adaconvert.io.names import escape
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

BATCH = 16


class Examples(Protocol):
    """What a classifier is measured on: `Labelled` texts, or `adaconvert.data.images.Images`.

    Attributes:
        labels: the class of each.
        names: where each comes from.
        unit: what they are called, such as "texts".
    """

    @property
    def labels(self) -> tuple[int, ...]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def unit(self) -> str: ...

    def batches(self, size: int) -> Iterable[list[int]]:
        """Return which of them run together."""

    def inputs(self, model: Any, rows: Sequence[int]) -> Iterable[dict[str, Tensor]]:
        """Return the arguments of the calls that run `model` on some of them, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Labelled texts as token ids.

    Attributes:
        ids: one sequence a text, cut to the positions of the model.
        labels: the class of each.
        names: where each comes from.
        padding: id that fills a batch.
        cut: texts that were too long.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    padding: int
    cut: int = 0

    @property
    def unit(self) -> str:
        """Return what they are called in reports."""
        return "texts"

    def batches(self, size: int) -> Iterator[list[int]]:
        """Yield indices of texts of similar length, the longest first."""
        order = sorted(range(len(self.ids)), key=lambda index: -len(self.ids[index]))
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def inputs(self, model: Any, rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Yield the arguments of the calls that run `model` on some of the texts."""
        groups = [list(rows)]
        if getattr(model.config.get_text_config(), "pad_token_id", None) is None:
            # without a padding id a decoder takes the last position for the last token
            groups = [[row] for row in rows]
        for group in groups:
            yield {name: value.to(model.device) for name, value in self.padded(group).items()}

    def padded(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return ids and mask of some of the texts, [B, S], padded at the end to the longest."""
        import torch

        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(self.ids[row])] = torch.tensor(self.ids[row])
            mask[place, : len(self.ids[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(slots=True, kw_only=True)
class ClassScore:
    """What a classifier made of each text.

    Attributes:
        right: bool [D] the most likely class is the label.
        loss: float64 [D] negative log-likelihood of the label in nats.
        chosen: int64 [D] most likely class.
        agreeing: bool [D] it is the reference's, None without a reference.
        tally: what running it cost.
    """

    right: numpy.ndarray[Any, Any]
    loss: numpy.ndarray[Any, Any]
    chosen: numpy.ndarray[Any, Any]
    agreeing: numpy.ndarray[Any, Any] | None = None
    tally: Tally = field(default_factory=Tally)


def read_labelled(
    where: str | Path,
    folder: Path,
    config: Any,
    *,
    field: str = "text",
    label_field: str = "label",
    split: str | None = None,
    max_documents: int | None = None,
    length: int | None = None,
) -> Labelled:
    """Return labelled texts, tokenised for the classifier in `folder`.

    Args:
        where: as for `read_documents`.
        folder: the checkpoint.
        config: its transformers config, which names the classes.
        field, label_field: what holds the text, and its class as a number or by name.
        split, max_documents: as for `read_documents`.
        length: most tokens of a text; the model's positions when smaller or not given.

    Raises:
        DataError: missing or empty data, a missing field, or a label the model does not have.
        OptionError: the model gives several labels at once, or a number.
    """
    check_single_label(config)
    limits = Limits.of(folder)
    tokenizer = load_tokenizer(folder)
    room = min(n for n in (length, limits.positions, 1 << 30) if n)
    ids: list[tuple[int, ...]] = []
    labels, names, cut = [], [], 0
    fields, few = (field, label_field), max_documents is not None
    for row in iter_rows(where, fields, split=split, streaming=few):
        tokens = encode(tokenizer, text_of(row, field))
        limits.check(tokens, tokenizer, row.name)
        cut += len(tokens) > room
        ids.append(tuple(tokens[:room]) or (padding_id(tokenizer, limits.vocab),))
        labels.append(label_of(row.values[1], config, f"{row.name} field '{escape(label_field)}'"))
        names.append(row.name)
        if len(ids) == max_documents:
            break
    if not ids:
        raise DataError("holds no labelled text", where=escape(Path(str(where)).name))
    return Labelled(
        ids=tuple(ids),
        labels=tuple(labels),
        names=tuple(names),
        padding=_padding(config, tokenizer, limits.vocab),
        cut=cut,
    )


def score_labelled(
    variants: Sequence[Variant],
    data: Examples,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[ClassScore]:
    """Return what every variant makes of every text or image.

    Args:
        variants: at most one of them the reference, which is then the first.
        data: the texts or images.
        batch_size: how many run together.
        progress: show a progress bar on a terminal.

    Raises:
        SourceError: a model computes NaN; names the first text.
        DataError: an image cannot be read.
    """
    import torch

    found = [_empty(len(data.names)) for _ in variants]
    shown = bar(len(data.names) * len(variants), "evaluate", data.unit, enabled=progress)
    with torch.inference_mode(), shown:
        for rows in data.batches(batch_size or BATCH):
            for variant, score in zip(variants, found, strict=True):
                logits = _logits(variant, data, rows, score.tally)
                _add(score, logits, data, rows, variant.label)
                shown.update(len(rows))
    if variants[0].is_reference:
        for score in found[1:]:
            score.agreeing = score.chosen == found[0].chosen
    return found


def _padding(config: Any, tokenizer: Any, vocab: int) -> int:
    # decoders find the last real token by the config's padding id
    found = getattr(config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) else padding_id(tokenizer, vocab)


def _empty(texts: int) -> ClassScore:
    import numpy

    return ClassScore(
        right=numpy.zeros(texts, dtype=bool),
        loss=numpy.zeros(texts),
        chosen=numpy.zeros(texts, dtype="int64"),
    )


def _logits(variant: Variant, data: Examples, rows: Sequence[int], tally: Tally) -> Tensor:
    """Return logits [B, C]."""
    import torch

    model, found = variant.model, []
    for inputs in data.inputs(model, rows):
        with variant.setting.applied(model), tally.counting(model):
            out = model(**inputs)
        found.append(out.logits.float().cpu())
    return torch.cat(found)


def _add(
    score: ClassScore, logits: Tensor, data: Examples, rows: Sequence[int], label: str
) -> None:
    for row, values in zip(rows, logits, strict=True):
        if not bool(values.isfinite().all()):
            raise SourceError(
                "the model computes NaN or an infinite logit",
                where=escape(label, 80),
                found=f"first in {data.unit[:-1]} {data.names[row]}",
                hint="Its weights or its dtype are at fault: try --dtype float32.",
            )
        score.chosen[row] = int(values.argmax())
        score.right[row] = score.chosen[row] == data.labels[row]
        score.loss[row] = -float(values.log_softmax(-1)[data.labels[row]])
