"""Next-token loss of causal models, document by document, and how far they are from a reference.

The first token of a block is not predicted. Settings share the passes of the reference, and run
batch by batch in turn.

Shapes: D documents, N blocks, L tokens of a block, B blocks of a batch, S tokens of its longest
block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaconvert.errors import DataError, SourceError
from adaconvert.evaluate.compute import Tally
from adaconvert.evaluate.real_experts import ClassTally, null_sites
from adaconvert.evaluate.settings import Setting
from adaconvert.io.names import escape
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from adaconvert.data.tokens import TokenBlocks
    from adaconvert.evaluate.token_classes import TokenClasses

#: bytes the logits of a batch may take in fp32 when the caller gives no batch size.
_LOGIT_BYTES = 256 << 20
_MOST_BLOCKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model at a setting.

    Attributes:
        label: what the report calls it.
        model: a transformers model.
        setting: of its knobs.
        is_reference: the others are compared with it.
    """

    label: str
    model: Any
    setting: Setting
    is_reference: bool = False


@dataclass(slots=True, kw_only=True)
class TextScore:
    """Sums over the predicted tokens of each document.

    Attributes:
        tokens: int64 [D] predicted tokens.
        loss: float64 [D] negative log-likelihood in nats.
        agreeing: int64 [D] tokens whose most likely continuation is the reference's.
        divergence: float64 [D] KL(reference || model) in nats.
        compared: there was a reference, so the last two hold something.
        tally: what running it cost.
        classes: what the tokens of each class ran, None where there are no null experts.
    """

    tokens: numpy.ndarray[Any, Any]
    loss: numpy.ndarray[Any, Any]
    agreeing: numpy.ndarray[Any, Any]
    divergence: numpy.ndarray[Any, Any]
    compared: bool = False
    tally: Tally = field(default_factory=Tally)
    classes: ClassTally | None = None

    @staticmethod
    def empty(documents: int) -> TextScore:
        """Return the score of nothing."""
        import numpy

        def zeros(kind: str) -> numpy.ndarray[Any, Any]:
            return numpy.zeros(documents, dtype=kind)

        return TextScore(
            tokens=zeros("int64"),
            loss=zeros("float64"),
            agreeing=zeros("int64"),
            divergence=zeros("float64"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Blocks that run together.

    Attributes:
        ids: int64 [B, S].
        mask: bool [B, S], None without padding.
        rows: positions of the blocks.
        lengths: real tokens of each block.
        documents: document of each block.
    """

    ids: Tensor
    mask: Tensor | None
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: tuple[int, ...]


def score_texts(
    variants: Sequence[Variant],
    blocks: TokenBlocks,
    names: Sequence[str],
    *,
    batch_size: int | None = None,
    progress: bool = False,
    classes: TokenClasses | None = None,
) -> list[TextScore]:
    """Return the score of every variant.

    Args:
        variants: at most one of them the reference, which is then the first.
        blocks: the text.
        names: of documents, for errors.
        batch_size: blocks of a batch, None for what bounds the memory of the logits.
        progress: show a progress bar on a terminal.
        classes: of the tokens; what each class runs is added up for models with null experts.

    Raises:
        SourceError: a model computes NaN or an infinite loss; names the first document.
        DataError: the reference has another vocabulary.
    """
    import torch

    scores = [TextScore.empty(len(names)) for _ in variants]
    for variant, score in zip(variants, scores, strict=True):
        sites = {} if classes is None else null_sites(variant.model)
        score.classes = ClassTally(classes, sites) if classes is not None and sites else None
    size = batch_size or _fitting(variants, blocks.length)
    with (
        torch.inference_mode(),
        bar(len(blocks) * len(variants), "evaluate", "blocks", enabled=progress) as shown,
    ):
        for batch in batches(blocks, size):
            reference = None
            for variant, score in zip(variants, scores, strict=True):
                logits = _logits(variant, batch, score)
                _add(score, logits, batch, reference, names, variant.label)
                if variant.is_reference:
                    reference = logits
                shown.update(len(batch.lengths))
    return scores


def batches(blocks: TokenBlocks, size: int) -> Iterator[Batch]:
    """Yield the blocks in batches of similar length, padded at the end to the longest of each."""
    import numpy
    import torch

    lengths = blocks.weights.sum(1)
    order = numpy.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = int(lengths[rows].max())
        mask = blocks.weights[rows, :longest]
        yield Batch(
            ids=torch.from_numpy(blocks.ids[rows, :longest]),
            mask=None if mask.all() else torch.from_numpy(mask),
            rows=tuple(int(row) for row in rows),
            lengths=tuple(int(n) for n in lengths[rows]),
            documents=tuple(int(d) for d in blocks.document[rows]),
        )


def _fitting(variants: Sequence[Variant], length: int) -> int:
    vocab = max(int(v.model.config.get_text_config().vocab_size) for v in variants)
    return max(1, min(_MOST_BLOCKS, _LOGIT_BYTES // (4 * vocab * length)))


def _logits(variant: Variant, batch: Batch, score: TextScore) -> Tensor:
    """Return logits [B, S, V]; what it cost is in the tallies."""
    device = variant.model.device
    mask = {} if batch.mask is None else {"attention_mask": batch.mask.to(device).long()}
    with ExitStack() as stack:
        stack.enter_context(variant.setting.applied(variant.model))
        stack.enter_context(score.tally.counting(variant.model))
        if score.classes is not None:
            stack.enter_context(score.classes.counting(variant.model, batch.rows))
        out = variant.model(input_ids=batch.ids.to(device), use_cache=False, **mask)
    logits: Tensor = out.logits
    return logits


def _add(
    score: TextScore,
    logits: Tensor,
    batch: Batch,
    reference: Tensor | None,
    names: Sequence[str],
    label: str,
) -> None:
    """Add one batch to a score; row by row, so that only one row is held in fp32 at a time."""
    for row, (length, document) in enumerate(zip(batch.lengths, batch.documents, strict=True)):
        own = logits[row, : length - 1].float().log_softmax(-1)
        targets = batch.ids[row, 1:length].to(own.device)
        losses = -own.gather(-1, targets[:, None])[:, 0]
        loss = float(losses.double().sum())
        _check(loss, own, names[document], label)
        score.tokens[document] += length - 1
        score.loss[document] += loss
        if reference is not None:
            other = reference[row, : length - 1].float().to(own.device)
            _check_vocabulary(own.shape[-1], other.shape[-1])
            _compare(score, document, own, other.log_softmax(-1))


def _compare(score: TextScore, document: int, own: Tensor, other: Tensor) -> None:
    """Add agreement and divergence of log-probabilities [S, V]."""
    import torch

    score.compared = True
    score.agreeing[document] += int((own.argmax(-1) == other.argmax(-1)).sum())
    chance, gap = other.exp(), other - own
    # p log(p/q) - p + q adds up to the same and is nowhere below zero, so rounding cancels and
    # nothing is cut off at zero, which would make small divergences look larger
    close = chance * (gap + torch.expm1(-gap))
    far = (chance * gap).where(chance > 0, 0.0) - chance + own.exp()
    terms = close.where(gap.abs() < 1, far)
    score.divergence[document] += float(terms.sum(dtype=torch.float64))


def _check(loss: float, log_probabilities: Tensor, name: str, label: str) -> None:
    if loss == loss and abs(loss) != float("inf") and not bool(log_probabilities.isnan().any()):
        return
    what = "NaN" if loss != loss or bool(log_probabilities.isnan().any()) else "an infinite loss"
    raise SourceError(
        f"the model computes {what}",
        where=escape(label, 80),
        found=f"first in document {name}",
        hint="Its weights or its dtype are at fault: look at them with `adaconvert inspect`, or "
        "try --dtype float32.",
    )


def _check_vocabulary(own: int, other: int) -> None:
    if own != other:
        raise DataError(
            "the reference has another vocabulary",
            where="--reference",
            expected=f"logits of {own} tokens",
            found=other,
        )
