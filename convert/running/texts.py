"""The texts a recipe names: found before anything runs, and known again when they have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from adaconvert.data.hub import HubId
from adaconvert.data.rows import READERS, existing
from adaconvert.errors import AdaconvertError, DataError, OptionError
from adaconvert.io.fs import reporting
from adaconvert.io.names import escape
from adaconvert.recipe.model import Recipe, Stage
from adaconvert.recipe.options import TEXT_SOURCE, TEXT_SOURCES

#: larger files are known by size and time of change instead of their bytes.
HASHED: Final = 256 << 20


def expand(value: tuple[str, ...], recipe: Recipe) -> tuple[str, ...]:
    """Return texts with those of the recipe in the place of references."""
    return tuple(
        text for name in value for text in (recipe.data[name[1:]] if name[:1] == "$" else (name,))
    )


def texts_of(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """Return every text a stage reads."""
    table = stage.does.table()
    found: list[str] = []
    for name, value in stage.options.items():
        if table[name].role == TEXT_SOURCES:
            found += expand(value, recipe)
        elif table[name].role == TEXT_SOURCE:
            found += expand((value,), recipe)
    return tuple(found)


def missing(stage: Stage, recipe: Recipe) -> list[str]:
    """Return the names of texts a stage reads that the recipe leaves to be given."""
    table = stage.does.table()
    found = []
    for name, value in stage.options.items():
        if table[name].role not in (TEXT_SOURCE, TEXT_SOURCES):
            continue
        for text in (value,) if isinstance(value, str) else value:
            if text[:1] == "$" and not recipe.data[text[1:]]:
                found.append(text[1:])
    return found


def check(stage: Stage, recipe: Recipe) -> None:
    """Return only when every text a stage reads was given, and local ones are there.

    Raises:
        OptionError: one is still to be given.
        DataError: one is neither a file or folder here nor the name of a hub data set.
    """
    for name in missing(stage, recipe):
        raise OptionError(
            f"is empty, and stage '{stage.name}' reads it",
            where=f"data.{name}",
            hint=f"Give text like that the model is for: --set data.{name}=FILE",
        )
    for text in texts_of(stage, recipe):
        if existing(plain(text)) is None and not _is_at_hub(plain(text)):
            raise DataError(
                "no such file or folder",
                where=f"stage '{stage.name}': {escape(text)}",
                hint="Give an existing file or folder, or a hub data set of the form org/name.",
            )


def _is_at_hub(name: str) -> bool:
    """Return whether a text can be a data set of the hub; "data/train.jsonl" is a file."""
    try:
        return Path(HubId.parse(name).name).suffix.lower() not in READERS
    except AdaconvertError:
        return False


def plain(text: str) -> str:
    """Return the name of a text without its weight."""
    path, comma, weight = text.rpartition(",")
    if not comma or os.path.lexists(text):
        return text
    try:
        float(weight)
    except ValueError:
        return text
    return path


def fingerprint(text: str) -> Any:
    """Return what tells whether a text has changed: JSON data; a hub data set is taken not to."""
    name = plain(text)
    path, weight = existing(name), text[len(name) :]
    if path is None:
        return text
    with reporting(escape(path.name)):
        return [path.name, weight, [_file(file) for file in _files(path)]]


def _files(path: Path) -> Iterator[Path]:
    """Yield regular files alone, as those who read data do: a pipe would never end."""
    if path.is_file():
        yield path
    for top, folders, names in os.walk(path):
        folders.sort()
        yield from (found for name in sorted(names) if (found := Path(top) / name).is_file())


def _file(path: Path) -> list[object]:
    status = path.stat()
    if status.st_size > HASHED:
        return [path.name, status.st_size, status.st_mtime_ns]
    with path.open("rb") as file:
        return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
