"""Labelled texts as documents: what is measured on blocks of them can be compared with a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconvert.data.labels import check_single_label, label_of
from adaconvert.data.rows import iter_rows
from adaconvert.data.text import Documents, documents_of, text_of
from adaconvert.errors import DataError
from adaconvert.io.names import escape


def read_labelled_documents(
    where: Sequence[str],
    config: Any,
    *,
    field: str,
    label_field: str,
    split: str | None = None,
    max_documents: int | None = None,
) -> tuple[Documents, tuple[int, ...]]:
    """Return texts, none of them blank and no two equal, and the class of each.

    Of equal texts the first is kept, with its label.

    Args:
        where: as for `data.text.read_documents` each.
        config: the classifier's transformers config, which names the classes.
        field, label_field: what holds the text, and its class as a number or by name.
        split, max_documents: as for `data.text.read_documents`.

    Raises:
        DataError: missing or empty data, a missing field, or a label the model does not have.
        OptionError: the model gives several labels at once, or a number.
    """
    check_single_label(config)
    found: dict[str, tuple[str, int]] = {}
    for one in where:
        read = 0
        fields, few = (field, label_field), max_documents is not None
        for row in iter_rows(one, fields, split=split, streaming=few):
            text = text_of(row, field)
            at = f"{row.name} field '{escape(label_field, 60)}'"
            label = label_of(row.values[1], config, at)
            if text.strip():
                found.setdefault(text, (row.name, label))
                read += 1
            if read == max_documents:
                break
        if not read:
            raise DataError("holds no labelled text", where=escape(Path(one).name))
    names, labels = zip(*found.values(), strict=True) if found else ((), ())
    return documents_of(tuple(found), tuple(names)), tuple(labels)
