"""From sums over documents to what the report says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaconvert.evaluate.perplexity import TextScore, Variant
from adaconvert.evaluate.report import DocumentResult, Result
from adaconvert.evaluate.statistics import Mean

if TYPE_CHECKING:
    import numpy

    from adaconvert.evaluate.classify import ClassScore


def of_texts(
    variants: Sequence[Variant], scores: Sequence[TextScore], names: Sequence[str]
) -> list[Result]:
    """Return the results of causal models; the first may be the reference."""
    first = scores[0] if variants[0].is_reference else None
    return [
        _of_text(variant, score, first, names)
        for variant, score in zip(variants, scores, strict=True)
    ]


def _of_text(
    variant: Variant, score: TextScore, reference: TextScore | None, names: Sequence[str]
) -> Result:
    counts = score.tokens
    compared = score.compared and reference is not None
    return Result(
        label=variant.label,
        setting=variant.setting,
        loss=Mean.of(score.loss, counts),
        increase=Mean.of(score.loss - reference.loss, counts) if compared and reference else None,
        agreement=Mean.of(score.agreeing, counts) if compared else None,
        divergence=Mean.of(score.divergence, counts) if compared else None,
        compute=score.tally.compute(),
        usage=score.tally.usage(),
        classes=None if score.classes is None else score.classes.result(),
        documents=tuple(
            DocumentResult(
                name=name,
                tokens=int(score.tokens[index]),
                loss=float(score.loss[index]),
                agreeing=int(score.agreeing[index]) if compared else None,
                divergence=float(score.divergence[index]) if compared else None,
            )
            for index, name in enumerate(names)
            if score.tokens[index]
        ),
    )


def of_labelled(
    variants: Sequence[Variant], scores: Sequence[ClassScore], names: Sequence[str]
) -> list[Result]:
    """Return the results of classifiers; the first may be the reference."""
    first = scores[0].loss if variants[0].is_reference else None
    return [
        _of_labelled(variant, score, first, names)
        for variant, score in zip(variants, scores, strict=True)
    ]


def _of_labelled(
    variant: Variant,
    score: ClassScore,
    reference: numpy.ndarray[Any, Any] | None,
    names: Sequence[str],
) -> Result:
    import numpy

    ones = numpy.ones(len(names))
    agreeing = score.agreeing
    compared = agreeing is not None and reference is not None
    return Result(
        label=variant.label,
        setting=variant.setting,
        loss=Mean.of(score.loss, ones),
        accuracy=Mean.of(score.right, ones),
        increase=Mean.of(score.loss - reference, ones) if compared else None,
        agreement=Mean.of(agreeing, ones) if agreeing is not None else None,
        compute=score.tally.compute(),
        usage=score.tally.usage(),
        documents=tuple(
            DocumentResult(
                name=name,
                tokens=1,
                loss=float(score.loss[index]),
                agreeing=None if agreeing is None else int(agreeing[index]),
                right=bool(score.right[index]),
            )
            for index, name in enumerate(names)
        ),
    )
