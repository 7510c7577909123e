"""Rows of text data: from files of four kinds, folders of them, or a data set of the hub.

Everything is read row by row. What is wrong is said with the file and the line, and text from files
is escaped before it is shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adaconvert.errors import DataError, SourceError
from adaconvert.io.names import escape, listing
from adaconvert.io.regular import open_regular
from adaconvert.io.strict_json import load_json, type_name

#: a longer line is refused instead of read into memory.
MAX_LINE = 64 << 20
#: a .json or .txt file is read whole.
MAX_WHOLE = 1 << 30
#: a plain text file is one row with this field.
TEXT_FIELD = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        name: file and place in it, for reports and messages.
        values: what the wanted fields hold, in the order they were asked for.
    """

    name: str
    values: tuple[object, ...]


def iter_rows(
    where: str | Path,
    fields: Sequence[str],
    *,
    split: str | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Yield the rows `where` holds, in stored order.

    Args:
        where: a .jsonl, .json, .txt or .parquet file, a folder of those, a folder written by
            `Dataset.save_to_disk`, or a hub data set such as "org/name", "org/name:config" or
            "org/name@revision:config".
        fields: what to take from every row.
        split: of a hub data set, or the word that names the files to take from a folder.
        streaming: read a hub data set as it arrives instead of downloading it first.

    Raises:
        DataError: it is missing, damaged, or a row lacks a field.
        ResourceError: it may not be read, or the hub cannot be reached.
    """
    path = existing(where)
    if path is None:
        from adaconvert.data import hub

        yield from hub.iter_rows(str(where), fields, split, streaming=streaming)
    elif path.is_dir():
        yield from _folder_rows(path, fields, split)
    elif split is not None:
        raise DataError(
            "a split selects part of a folder or of a hub data set, and this is a file",
            where=escape(path.name),
            found=f"split '{escape(split)}'",
        )
    else:
        yield from _file_rows(path, escape(path.name), fields)


def pick(row: object, fields: Sequence[str], where: str) -> tuple[object, ...]:
    """Return the values of `fields` in a row.

    Raises:
        DataError: it is no object, or lacks one; names those it has.
    """
    if not isinstance(row, Mapping):
        raise DataError("is not a JSON object", where=where, found=type_name(row))
    for field in fields:
        if field not in row:
            raise missing_field(field, list(row), where)
    return tuple(row[field] for field in fields)


def missing_field(field: str, found: Sequence[object], where: str) -> DataError:
    """Return the error for a row or table without `field`."""
    names = listing([f"'{escape(name, 60)}'" for name in found], 12) if found else "none"
    return DataError(
        f"there is no field '{escape(field, 60)}'",
        where=where,
        found=f"fields {names}" if found else names,
        hint="Name the field that holds the text (--field or --data-field) or the label "
        "(--label-field).",
    )


def existing(where: str | Path) -> Path | None:
    """Return what lies at `where`, None when it can only be a hub data set.

    Raises:
        DataError: it is a URL.
    """
    text = str(where)
    if "://" in text:
        # not echoed: it may hold a token
        raise DataError("a URL is not data", hint="Give a file, a folder, or a hub id.")
    try:
        path = Path(text).expanduser()
        if text and path.exists():
            return path
    # RuntimeError: "~nobody"; ValueError: a NUL; OSError: a name that is too long
    except (OSError, RuntimeError, ValueError):
        pass
    return None


def _folder_rows(folder: Path, fields: Sequence[str], split: str | None) -> Iterator[Row]:
    if is_saved(folder):
        from adaconvert.data import hub

        yield from hub.saved_rows(folder, fields, split)
        return
    for path in data_files(folder, split):
        yield from _file_rows(path, escape(path.relative_to(folder)), fields)


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def data_files(folder: Path, split: str | None) -> list[Path]:
    """Return the data files below a folder, sorted; hidden ones are left out.

    Raises:
        DataError: there is none, or none of the split.
    """
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in every if not _is_hidden(path.relative_to(folder))]
    files = [path for path in visible if path.suffix.lower() in READERS]
    label = escape(folder.name)
    if not files:
        found = listing([path.name for path in visible], 6) or "no file"
        raise DataError("holds no data", where=label, expected=KINDS, found=found)
    if split is None:
        return files
    named = [path for path in files if split in re.split(r"[-_.]", path.stem)]
    if not named:
        raise DataError(
            f"no file of split '{escape(split)}'",
            where=label,
            found=listing([path.name for path in files], 6),
        )
    return named


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_rows(path: Path, label: str, fields: Sequence[str]) -> Iterator[Row]:
    reader = READERS[suffix_of(path, label)]
    with opened(path, label) as file:
        yield from reader(file, label, fields)


def suffix_of(path: Path, label: str) -> str:
    """Return the ending that says how a file is read.

    Raises:
        DataError: it is none of those that are.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError("is no data file by its name", where=label, expected=KINDS)
    return suffix


@contextmanager
def opened(path: Path, label: str) -> Iterator[BinaryIO]:
    """Yield a regular file for reading; what is wrong with it is the data's fault.

    Raises:
        DataError: it is missing, or no regular file.
        ResourceError: it may not be read.
    """
    try:
        with (
            open_regular(path, label) as (descriptor, _),
            os.fdopen(os.dup(descriptor), "rb") as file,
        ):
            yield file
    except SourceError as error:
        raise DataError(
            error.message,
            where=error.where,
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from error


def _jsonl_rows(file: BinaryIO, label: str, fields: Sequence[str]) -> Iterator[Row]:
    for number, where, value in jsonl_values(file, label):
        yield Row(name=f"{label}:{number}", values=pick(value, fields, where))


def jsonl_values(file: BinaryIO, label: str) -> Iterator[tuple[int, str, object]]:
    """Yield number, place and value of every line that is not blank.

    Raises:
        DataError: a line is too long, no UTF-8 or no JSON.
    """
    for number, line in enumerate(_lines(file, label), 1):
        where = f"{label} line {number}"
        text = _decoded(line, where).strip().removeprefix("\ufeff")
        if text:
            yield number, where, _parsed(text, where)


def _lines(file: BinaryIO, label: str) -> Iterator[bytes]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(
                "is too long to be read",
                where=f"{label} line {number}",
                expected=f"at most {MAX_LINE} bytes",
            )
        yield line


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise DataError(
            "is not UTF-8 text", where=where, found=found, hint="Save it as UTF-8."
        ) from None


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = f"'{escape(error.msg)}' at column {error.colno}"
    except RecursionError:
        found = "too many levels"
    except ValueError:
        # Python refuses to convert integers of more than 4300 digits
        found = "a number too long"
    raise DataError("is not valid JSON", where=where, found=found)


def _json_rows(file: BinaryIO, label: str, fields: Sequence[str]) -> Iterator[Row]:
    for number, where, value in json_values(file, label, fields):
        yield Row(name=f"{label}:{number}", values=pick(value, fields, where))


def json_values(
    file: BinaryIO, label: str, fields: Sequence[str]
) -> Iterator[tuple[int, str, object]]:
    """Yield number, place and value of every item; an object with one of `fields` is an item.

    Raises:
        DataError: the file is too large or no UTF-8.
        SourceError: it is no JSON.
    """
    raw = _whole(file, label)
    try:
        value = load_json(raw, label, MAX_WHOLE)
    except SourceError as error:
        if "Extra data" not in str(error.found):
            raise
        # JSON lines under the wrong name
        file.seek(0)
        yield from jsonl_values(file, label)
        return
    for number, item in enumerate(_items_of(value, fields), 1):
        yield number, f"{label} item {number}", item


def _items_of(value: object, fields: Sequence[str]) -> list[object]:
    """Return the items of a JSON value: a list, an object around one list, or one item."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and not any(field in value for field in fields):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) == 1:
            return list(lists[0])
    return [value]


def _whole(file: BinaryIO, label: str) -> bytes:
    raw = file.read(MAX_WHOLE + 1)
    if len(raw) > MAX_WHOLE:
        raise DataError(
            "is too large to be read whole",
            where=label,
            expected=f"at most {MAX_WHOLE} bytes",
            hint="Store it as JSON lines or Parquet.",
        )
    return raw


def _text_rows(file: BinaryIO, label: str, fields: Sequence[str]) -> Iterator[Row]:
    text = _decoded(_whole(file, label), label).removeprefix("\ufeff")
    yield Row(name=label, values=pick({TEXT_FIELD: text}, fields, label))


def _parquet_rows(file: BinaryIO, label: str, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        for field in fields:
            if field not in table.schema_arrow.names:
                raise missing_field(field, table.schema_arrow.names, label)
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=list(fields)):
            columns = [batch.column(field).to_pylist() for field in fields]
            for values in zip(*columns, strict=True):
                number += 1
                yield Row(name=f"{label}:{number}", values=values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError("is no readable Parquet file", where=label) from error


READERS: dict[str, Callable[[BinaryIO, str, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".txt": _text_rows,
    ".parquet": _parquet_rows,
}
KINDS = "a .jsonl, .json, .txt or .parquet file"
