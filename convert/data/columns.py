"""The names of what a source holds, without reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from adaconvert.data.rows import (
    TEXT_FIELD,
    data_files,
    existing,
    is_saved,
    json_values,
    jsonl_values,
    opened,
    suffix_of,
)
from adaconvert.errors import DataError
from adaconvert.io.names import escape
from adaconvert.io.strict_json import type_name


def columns_of(
    where: str | Path,
    wanted: Sequence[str],
    *,
    split: str | None = None,
    streaming: bool = False,
) -> tuple[str, ...]:
    """Return the fields of the first row, or the columns of the first table; () when it is empty.

    Args:
        where: as for `rows.iter_rows`.
        wanted: names that are looked for; a .json object with one of them is a row.
        split: as for `rows.iter_rows`.
        streaming: as for `rows.iter_rows`.

    Raises:
        DataError: it is missing or damaged.
        ResourceError: it may not be read, or the hub cannot be reached.
    """
    path = existing(where)
    if path is None or (path.is_dir() and is_saved(path)):
        from adaconvert.data import hub

        if path is None:
            return tuple(hub.columns(str(where), split, streaming=streaming))
        return tuple(hub.saved_columns(path, split))
    if not path.is_dir():
        return _file_columns(path, escape(path.name), wanted)
    first = data_files(path, split)[0]
    return _file_columns(first, escape(first.relative_to(path)), wanted)


def _file_columns(path: Path, label: str, wanted: Sequence[str]) -> tuple[str, ...]:
    suffix = suffix_of(path, label)
    if suffix == ".txt":
        return (TEXT_FIELD,)
    with opened(path, label) as file:
        if suffix == ".parquet":
            return _parquet_columns(file, label)
        rows = jsonl_values(file, label) if suffix == ".jsonl" else json_values(file, label, wanted)
        # nothing but the first row is looked at
        for _, at, value in rows:
            if not isinstance(value, Mapping):
                raise DataError("is not a JSON object", where=at, found=type_name(value))
            return tuple(map(str, value))
    return ()


def _parquet_columns(file: object, label: str) -> tuple[str, ...]:
    import pyarrow
    import pyarrow.parquet

    try:
        return tuple(pyarrow.parquet.ParquetFile(file).schema_arrow.names)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError("is no readable Parquet file", where=label) from error
