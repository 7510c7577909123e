"""Data sets of the hub, and those `datasets` wrote to disk; neither runs code of a repository."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaconvert.data.rows import Row, missing_field
from adaconvert.errors import AdaconvertError, DataError, ResourceError
from adaconvert.io.names import escape, listing

_HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?", re.ASCII
)


def iter_rows(
    where: str, fields: Sequence[str], split: str | None, at_most: int | None
) -> Iterator[Row]:
    """Yield the rows of a hub data set, downloaded whole unless `at_most` is given.

    Raises:
        DataError: no such file, folder, data set, configuration, split or field.
        ResourceError: the hub cannot be reached.
    """
    match = _HUB_ID.fullmatch(where)
    if match is None:
        raise DataError(
            "no such file or folder",
            where=escape(where) or "''",
            hint="Give an existing file or folder, or a hub data set of the form org/name.",
        )
    import datasets

    name, config = match["name"], match["config"]
    try:
        found = datasets.get_dataset_split_names(name, config)
        chosen = _choose(split, found, where)
        table = datasets.load_dataset(name, config, split=chosen, streaming=at_most is not None)
    except AdaconvertError:
        raise
    # what the client raises differs between its versions, and all of it is about this data set
    except Exception as error:
        raise _hub_error(error, where) from error
    yield from _table_rows(table, f"{where}[{chosen}]", fields)


def saved_rows(folder: Path, fields: Sequence[str], split: str | None) -> Iterator[Row]:
    """Yield the rows of a folder written by `Dataset.save_to_disk`.

    Raises:
        DataError: it is damaged, or has no such split or field.
    """
    import datasets

    label = escape(folder.name)
    try:
        table = datasets.load_from_disk(str(folder))
    # files of foreign origin go to several parsers, which raise what they like
    except Exception as error:
        raise DataError("is no readable data set", where=label) from error
    if isinstance(table, Mapping):
        table = table[_choose(split, list(table), label)]
    elif split is not None:
        raise DataError("has no splits", where=label, found=f"split '{escape(split)}'")
    yield from _table_rows(table, label, fields)


def _table_rows(table: Any, label: str, fields: Sequence[str]) -> Iterator[Row]:
    columns = table.column_names
    for number, row in enumerate(table, 1):
        for field in fields:
            if field not in row:
                raise missing_field(field, list(columns or row), label)
        yield Row(name=f"{label}:{number}", values=tuple(row[field] for field in fields))


def _choose(split: str | None, found: Sequence[str], where: str) -> str:
    """Return the split to read: the one asked for, or the only one."""
    if split is None and len(found) == 1:
        return found[0]
    if split in found:
        return str(split)
    raise DataError(
        "has several splits" if split is None else f"has no split '{escape(split)}'",
        where=escape(where),
        found=listing(list(found), 12),
        hint="Choose one with --split.",
    )


def _hub_error(error: Exception, where: str) -> AdaconvertError:
    """Return one line for what `datasets` raised; its own text can hold URLs and headers."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    at = escape(where)
    if "GatedRepoError" in kinds:
        hint = "Accept its terms on the hub and log in with `hf auth login`."
        return DataError("the data set is gated", where=at, hint=hint)
    if isinstance(error, ConnectionError | TimeoutError) or "OfflineModeIsEnabled" in kinds:
        hint = "Check the network and HF_HUB_OFFLINE, or give a file or folder."
        return ResourceError(
            "no such file or folder, and the hub cannot be reached", where=at, hint=hint
        )
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "HFValidationError"}:
        return DataError("no such file or folder, and no such hub data set", where=at)
    if isinstance(error, ValueError) and "onfig" in str(error):
        hint = "Name it after a colon, as in org/name:config."
        return DataError("the data set needs the name of a configuration", where=at, hint=hint)
    return DataError(f"the data set cannot be loaded ({type(error).__name__})", where=at)
