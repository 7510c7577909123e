"""What data tell of a checkpoint and its reference: read, scored, and summed up by setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adaconvert.data.images import load_processor, read_images
from adaconvert.errors import OptionError
from adaconvert.evaluate import classify, results
from adaconvert.evaluate.exit_table import exit_table
from adaconvert.evaluate.loaded import Loaded
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.evaluate.perplexity import Variant, score_texts
from adaconvert.evaluate.real_experts import null_sites
from adaconvert.evaluate.report import Result
from adaconvert.evaluate.token_classes import token_classes
from adaconvert.io.names import escape

if TYPE_CHECKING:
    from torch import Tensor

    from adaconvert.data.images import Images
    from adaconvert.data.tokens import TokenBlocks

_NO_CLASSES: Final = (
    "real experts are not told by class of token: the tokenizer does not say where its tokens lie"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What data gave.

    Attributes:
        results: one for each variant.
        data: facts of the data, for the report.
        sample: token ids to measure speed on; of an image, as many as it has positions.
        lengths: length of a text -> how many were measured.
        pixels: the image to measure speed on, [1, C, H, W].
        notes: what the reader should know.
        exits: a row for each exit, see `exit_table`.
    """

    results: list[Result]
    data: dict[str, object]
    sample: tuple[int, ...]
    lengths: Mapping[int, int]
    pixels: Tensor | None = None
    notes: tuple[str, ...] = ()
    exits: tuple[dict[str, object], ...] = ()


def _measure_texts(
    options: EvaluateOptions,
    loaded: Loaded,
    reference: Loaded | None,
    variants: Sequence[Variant],
) -> Measured:
    from adaconvert.data.text import read_documents
    from adaconvert.data.tokens import token_blocks

    assert options.data is not None
    documents = read_documents(
        options.data,
        field=options.field,
        split=options.split,
        max_documents=options.max_documents,
    )

    def cut(folder: Path, progress: bool) -> TokenBlocks:
        return token_blocks(
            documents,
            folder,
            length=options.length,
            max_tokens=options.max_tokens,
            seed=options.seed,
            progress=progress,
        )

    blocks = cut(loaded.source.root, options.progress)
    if reference is not None and not _same_tokens(cut(reference.source.root, False), blocks):
        raise OptionError(
            "cuts the text into other tokens than the checkpoint",
            where="--reference",
            hint="Compare with the model this checkpoint was made from.",
        )
    nulled = bool(null_sites(loaded.model))
    classes = token_classes(blocks, documents, loaded.source.root) if nulled else None
    scores = score_texts(
        variants,
        blocks,
        documents.names,
        batch_size=options.batch_size,
        progress=options.progress,
        classes=classes,
    )
    lengths = blocks.weights.sum(1)
    return Measured(
        results=results.of_texts(variants, scores, documents.names),
        data={
            "name": _name(options.data),
            "documents": len(set(blocks.document.tolist())),
            "tokens": blocks.tokens,
            "blocks": len(blocks),
            "length": blocks.length,
            "digest": documents.digest,
        },
        sample=_sample(blocks),
        lengths=Counter(lengths.tolist()),
        notes=(_NO_CLASSES,) if nulled and classes is None else (),
        exits=exit_table(loaded.model, blocks, options.batch_size),
    )


def _same_tokens(one: TokenBlocks, other: TokenBlocks) -> bool:
    """Return whether blocks hold the same tokens, whatever stands where there are none."""
    if one.weights.tolist() != other.weights.tolist():
        return False
    return bool((one.ids[one.weights] == other.ids[other.weights]).all())


def _measure_labelled(
    options: EvaluateOptions,
    loaded: Loaded,
    reference: Loaded | None,
    variants: Sequence[Variant],
) -> Measured:
    assert options.data is not None
    data = classify.read_labelled(
        options.data,
        loaded.source.root,
        loaded.model.config,
        field=options.field,
        label_field=options.label_field,
        split=options.split,
        max_documents=options.max_documents,
        length=options.length,
    )
    _check_classes(loaded, reference)
    scores = classify.score_labelled(
        variants, data, batch_size=options.batch_size, progress=options.progress
    )
    tokens = sum(len(ids) for ids in data.ids)
    return Measured(
        results=results.of_labelled(variants, scores, data.names),
        data={"name": _name(options.data), "documents": len(data.ids), "tokens": tokens},
        sample=max(data.ids, key=len),
        lengths=Counter(map(len, data.ids)),
        notes=(f"{data.cut} texts were cut to fit the model",) if data.cut else (),
    )


def _check_classes(loaded: Loaded, reference: Loaded | None) -> None:
    if reference is None:
        return
    if reference.model.config.num_labels != loaded.model.config.num_labels:
        raise OptionError("has another number of classes", where="--reference")


def _measure_images(
    options: EvaluateOptions,
    loaded: Loaded,
    reference: Loaded | None,
    variants: Sequence[Variant],
) -> Measured:
    assert options.data is not None
    images = read_images(
        options.data,
        loaded.source.root,
        loaded.model.config,
        field=options.field,
        label_field=options.label_field,
        split=options.split,
        max_documents=options.max_documents,
    )
    _check_classes(loaded, reference)
    if reference is not None and not _same_pixels(reference, images):
        raise OptionError(
            "makes other pixel values of images than the checkpoint",
            where="--reference",
            hint="Compare with the model this checkpoint was made from.",
        )
    scores = classify.score_labelled(
        variants, images, batch_size=options.batch_size, progress=options.progress
    )
    positions = images.processor.positions
    return Measured(
        results=results.of_labelled(variants, scores, images.names),
        data={
            "name": _name(options.data),
            "documents": len(images),
            "tokens": len(images) * positions,
        },
        sample=(0,) * positions,
        lengths={positions: len(images)},
        pixels=images.pixels([0]),
    )


def _same_pixels(reference: Loaded, images: Images) -> bool:
    other = load_processor(reference.source.root, reference.model.config)
    return other.facts() == images.processor.facts()


def _name(data: object) -> str:
    return escape(str(data).rstrip("/").rsplit("/", 1)[-1])


def _sample(blocks: TokenBlocks) -> tuple[int, ...]:
    """Return the real tokens of the longest block."""
    row = int(blocks.weights.sum(1).argmax())
    return tuple(int(i) for i in blocks.ids[row][blocks.weights[row]])


#: kind of a model -> what measures it.
MEASURES = {
    "causal": _measure_texts,
    "classifier": _measure_labelled,
    "image classifier": _measure_images,
}
