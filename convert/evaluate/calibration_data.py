"""The blocks a calibration measures on, and which split each of them is in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaconvert.data.images import image_blocks
from adaconvert.data.labelled import read_labelled_documents
from adaconvert.data.text import Documents, documents_of, read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import DataError
from adaconvert.evaluate.masking import Hidden, hide
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.testing_sequence import Integers, Splits, split, unit_losses

if TYPE_CHECKING:
    from adaconvert.data.images import Images
    from adaconvert.data.tokens import TokenBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read, and how it is cut.

    Attributes:
        data: files, folders or hub data sets, see `read_documents`; of images, see `read_images`.
        field, split: where in the data the text, or the path of an image, is.
        label_field: what holds its class; None where labels are not read.
        length: tokens of a block.
        max_tokens: tokens to calibrate on, None for all there are.
        max_documents: documents, or images, to read of each of `data`, None for all.
        unit: "document" or "block", see `testing_sequence`.
        seed: of the choice of blocks and of the splits.
        progress: show progress bars on a terminal.
    """

    data: tuple[str, ...]
    field: str = "text"
    split: str | None = None
    label_field: str | None = None
    length: int = 512
    max_tokens: int | None = 100_000
    max_documents: int | None = None
    unit: str = "document"
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One split: the blocks of its units.

    Attributes:
        blocks: [n] positions in `CalibrationData.blocks`.
        members: [n] which unit of the split each belongs to, 0 .. units - 1.
        units: how many units the split has.
    """

    blocks: Integers
    members: Integers
    units: int

    def means(self, losses: Floats, weights: Floats) -> Floats:
        """Return the mean of each unit, [units], of losses of the blocks, weighted by tokens."""
        return unit_losses(losses, weights, self.members, self.units)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """Blocks and their division into splits that share no unit.

    Attributes:
        blocks: what is measured on.
        names: where each document comes from, such as "text.jsonl:3".
        unit: "document" or "block".
        ordering, testing, evaluation: the splits.
        digest: sha256 over the blocks, the unit and the division.
        hidden: what is hidden of the blocks from a masked language model.
        labels: [documents] the class of each, None where labels were not read.
    """

    blocks: TokenBlocks
    names: tuple[str, ...]
    unit: str
    ordering: Part
    testing: Part
    evaluation: Part
    digest: str
    hidden: Hidden | None = None
    labels: Integers | None = None

    @property
    def units(self) -> int:
        """Return how many units there are in all."""
        return self.ordering.units + self.testing.units + self.evaluation.units

    def split_json(self, seed: int) -> dict[str, object]:
        """Return sizes of the splits, and of what is in them, as JSON values."""
        parts = (self.ordering, self.testing, self.evaluation)
        used = np.concatenate([part.blocks for part in parts])
        return {
            "unit": self.unit,
            "ordering": self.ordering.units,
            "testing": self.testing.units,
            "evaluation": self.evaluation.units,
            "blocks": len(used),
            "length": self.blocks.length,
            "tokens": int(self.blocks.weights[used].sum()),
            "seed": seed,
        }


def read_data(
    reading: Reading,
    folder: Path,
    shares: Sequence[float],
    *,
    whole: bool = False,
    masked: bool = False,
    images: Images | None = None,
    config: Any = None,
) -> CalibrationData:
    """Return the data of a calibration.

    With the unit "document", blocks are taken breadth first, one at random of every document, then
    a second of every one, until `max_tokens`: many documents tell more than many blocks of a few.

    Args:
        reading: what is read.
        folder: the checkpoint.
        shares: of the splits.
        whole: each document is one text to classify, so only its first block is used.
        masked: the model predicts hidden tokens.
        images: what is used instead of text; equal ones are used once.
        config: transformers config of the classifier, where labels are read.

    Raises:
        DataError: the data cannot be read, or hold fewer units than there are splits, or a label
            the model does not have, or the tokenizer has no mask token.
        OptionError: a number is out of range.
    """
    blocks, sources, labels = _blocks(reading, folder, images, config)
    by_document = reading.unit == "document"
    if whole and images is None:
        blocks = _first_blocks(blocks)
    kept = _breadth_first(blocks, reading.max_tokens, reading.seed, by_document)
    groups = blocks.document[kept] if by_document else kept
    names, members = np.unique(groups, return_inverse=True)
    wanted = sum(share > 0 for share in shares)
    if len(names) < wanted:
        raise DataError(
            f"too small to calibrate on: {wanted} splits need at least as many {reading.unit}s",
            where=_label(reading),
            expected=f"{wanted} or more",
            found=len(names),
            hint="Give more data, or --unit block for one long text.",
        )
    parts = split(len(names), seed=reading.seed, shares=shares)
    return CalibrationData(
        blocks=blocks,
        names=sources,
        unit=reading.unit,
        ordering=_part(kept, members, parts.ordering),
        testing=_part(kept, members, parts.testing),
        evaluation=_part(kept, members, parts.evaluation),
        digest=_digest(blocks.digest, reading.unit, kept, members, parts, labels),
        hidden=hide(blocks, folder, reading.seed) if masked else None,
        labels=labels,
    )


def _blocks(
    reading: Reading, folder: Path, images: Images | None, config: Any
) -> tuple[TokenBlocks, tuple[str, ...], Integers | None]:
    """Return what the model is run on, where each document comes from, and its label."""
    if images is not None:
        unique = images.unique()
        labels = None if reading.label_field is None else np.array(unique.labels, dtype=np.int64)
        return image_blocks(unique), unique.names, labels
    documents, labels = _documents(reading, config)
    blocks = token_blocks(
        documents, folder, length=reading.length, seed=reading.seed, progress=reading.progress
    )
    return blocks, documents.names, labels


def check_enough(data: CalibrationData, risk: Risk, shares: Sequence[float], where: str) -> None:
    """Return only when the testing split could certify anything at all.

    Raises:
        DataError: not even losses of zero would; says how many units are needed.
    """
    least = risk.smallest()
    if data.testing.units >= least:
        return
    raise too_small(data, least, shares, where, f"a limit of {risk.limit:g}, were every loss zero,")


def too_small(
    data: CalibrationData, needed: int, shares: Sequence[float], where: str, what: str
) -> DataError:
    """Return the error for a testing split of fewer units than are needed."""
    total = ceil(needed / shares[1])
    return DataError(
        f"too little data to certify anything: {what} takes about {needed} {data.unit}s in the "
        f"testing split, {total} in all",
        where=where,
        expected=f"about {total} {data.unit}s",
        found=f"{data.units} ({data.testing.units} of them for testing)",
        hint="Give more data, allow a higher loss, or choose by --budget, which promises nothing.",
    )


def _documents(reading: Reading, config: Any) -> tuple[Documents, Integers | None]:
    if reading.label_field is not None:
        found, labels = read_labelled_documents(
            reading.data,
            config,
            field=reading.field,
            label_field=reading.label_field,
            split=reading.split,
            max_documents=reading.max_documents,
        )
        return found, np.array(labels, dtype=np.int64)
    return _unlabelled(reading), None


def _unlabelled(reading: Reading) -> Documents:
    texts: list[str] = []
    names: list[str] = []
    for where in reading.data:
        found = read_documents(
            where, field=reading.field, split=reading.split, max_documents=reading.max_documents
        )
        texts += found.texts
        names += found.names
    if not texts:
        raise DataError("no data given", where="--data")
    # equal texts in two splits would be the same unit seen twice
    unique = dict(zip(texts, names, strict=True))
    return documents_of(tuple(unique), tuple(unique.values()))


def _label(reading: Reading) -> str:
    return ", ".join(Path(where).name or where for where in reading.data)


def _first_blocks(blocks: TokenBlocks) -> TokenBlocks:
    """Return the first block of every document: what a classifier reads of a text."""
    first = np.sort(np.unique(blocks.document, return_index=True)[1])
    return replace(
        blocks,
        ids=blocks.ids[first],
        document=blocks.document[first],
        weights=blocks.weights[first],
    )


def _breadth_first(
    blocks: TokenBlocks, max_tokens: int | None, seed: int, by_document: bool
) -> Integers:
    """Return positions of the blocks that are used, sorted."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(blocks))
    if by_document:
        seen: dict[int, int] = {}
        rank = np.empty(len(blocks), dtype=np.int64)
        for block in order:
            document = int(blocks.document[block])
            rank[block] = seen[document] = seen.get(document, -1) + 1
        order = order[np.argsort(rank[order], kind="stable")]
    if max_tokens is not None:
        tokens = np.cumsum(blocks.weights[order].sum(axis=1))
        order = order[: max(1, int(np.searchsorted(tokens, max_tokens, side="right")))]
    return np.sort(order).astype(np.int64)


def _part(kept: Integers, members: Integers, chosen: Integers) -> Part:
    place = np.full(int(members.max()) + 1, -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    inside = place[members] >= 0
    return Part(blocks=kept[inside], members=place[members[inside]], units=len(chosen))


def _digest(
    blocks: str,
    unit: str,
    kept: Integers,
    members: Integers,
    parts: Splits,
    labels: Integers | None,
) -> str:
    whole = hashlib.sha256(f"{blocks} {unit}\n".encode())
    arrays = (kept, members, parts.ordering, parts.testing, parts.evaluation)
    for array in arrays if labels is None else (*arrays, labels):
        whole.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        whole.update(b"\n")
    return whole.hexdigest()
