"""Documents: the texts a model is measured, calibrated or trained on."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from adaconvert.data.rows import TEXT_FIELD, Row, iter_rows
from adaconvert.errors import DataError, OptionError
from adaconvert.io.names import escape
from adaconvert.io.strict_json import type_name

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Texts in stored order, none of them blank.

    Attributes:
        texts: one text a document.
        names: file and place each comes from.
        digest: sha256 over the texts, the same whatever kind of file held them.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.texts)


def read_documents(
    where: str | Path,
    *,
    field: str = TEXT_FIELD,
    split: str | None = None,
    max_documents: int | None = None,
) -> Documents:
    """Return the documents `where` holds.

    Args:
        where: a .jsonl, .json, .txt or .parquet file, a folder of those or of a saved data set, or
            a hub data set such as "org/name" or "org/name:config". A .txt file is one document.
        field: what holds the text.
        split: of a hub data set, or the word that names the files to take from a folder.
        max_documents: documents to read, None for all.

    Raises:
        DataError: it is missing, empty or damaged, or has no such field (exit code 2).
        OptionError: `max_documents` is no positive number (2).
        ResourceError: it may not be read, or the hub cannot be reached (6).
    """
    if max_documents is not None and max_documents < 1:
        raise OptionError(
            "is out of range", where="max_documents", expected="1 or more", found=max_documents
        )
    rows = iter_rows(where, (field,), split=split, streaming=max_documents is not None)
    kept: list[tuple[str, str]] = []
    blank = 0
    for row in rows:
        text = text_of(row, field)
        if not text.strip():
            blank += 1
            continue
        kept.append((text, row.name))
        if len(kept) == max_documents:
            break
    if blank:
        _log.info("%s: %d blank documents left out", escape(Path(str(where)).name), blank)
    if not kept:
        found = f"{blank} blank documents" if blank else "no document"
        raise DataError("holds no text", where=escape(Path(str(where)).name), found=found)
    texts, names = zip(*kept, strict=True)
    return documents_of(texts, names)


def documents_of(texts: tuple[str, ...], names: tuple[str, ...] | None = None) -> Documents:
    """Return texts that are already in memory as documents.

    Raises:
        DataError: there is none.
    """
    if not texts:
        raise DataError("there is no text")
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    numbered = tuple(f"document {number}" for number in range(1, len(texts) + 1))
    return Documents(texts=tuple(texts), names=names or numbered, digest=digest.hexdigest())


def text_of(row: Row, field: str) -> str:
    """Return the text a row holds in its first value.

    Raises:
        DataError: it is no text, or text that no UTF-8 file can hold.
    """
    value = row.values[0]
    where = f"{row.name} field '{escape(field, 60)}'"
    if not isinstance(value, str):
        raise DataError("is not text", where=where, expected="a string", found=type_name(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{escape(value[error.start])} at character {error.start}"
        raise DataError("holds half a surrogate pair", where=where, found=found) from None
    return value
