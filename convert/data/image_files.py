"""Which image files there are, and which class each is of; no image is opened.

pets/cat/001.jpg  pets/dog/7.png       a folder of one folder for each class
{"image": "001.jpg", "label": "cat"}   rows, with paths relative to the file that holds them
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from adaconvert.data.labels import label_of
from adaconvert.data.rows import Row, existing, iter_rows, missing_field, opened
from adaconvert.errors import DataError, ResourceError
from adaconvert.io.names import escape, listing
from adaconvert.io.strict_json import type_name

#: what an image file is called, by the formats that are decoded.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_KINDS = "a folder of one folder of images for each class, or a .jsonl, .json or .csv file"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """One image that is named by the data.

    Attributes:
        path: where it lies.
        name: for reports and messages.
        label: its class, None where none was asked for.
    """

    path: Path
    name: str
    label: int | None = None


def image_files(
    where: str | Path,
    config: Any,
    *,
    field: str,
    label_field: str | None,
    split: str | None = None,
    max_images: int | None = None,
) -> tuple[ImageFile, ...]:
    """Return the images `where` holds; those of a folder by turns from each class, in order of
    their names, so that the first ones are of all classes; those of a file in stored order.

    Args:
        where: folder or file, see above.
        config: transformers config, which names the classes.
        field: of rows, what holds the path of the image.
        label_field: of rows, what holds its class; None when no class is needed.
        split: of a folder, the part of it to read.
        max_images: where to stop, None for all.

    Raises:
        DataError: it is missing, damaged or empty, or a label is none of the model's.
        ResourceError: it may not be read.
    """
    path = existing(where)
    if path is None:
        raise DataError(
            "there is no such file or folder",
            where=escape(str(where), 80),
            expected=_KINDS,
            hint="Images of a hub data set have to be saved to a folder first.",
        )
    if path.is_dir():
        named = _of_folder(path, config, split, labelled=label_field is not None)
    else:
        fields = (field,) if label_field is None else (field, label_field)
        named = _of_rows(path, config, fields, split)
    try:
        found = tuple(islice(named, max_images))
    except OSError as error:
        raise ResourceError(
            "cannot be read", where=escape(path.name), found=error.strerror
        ) from error
    if not found:
        raise DataError(
            "holds no image",
            where=escape(path.name),
            expected=_KINDS,
            hint=f"Image files end in {', '.join(SUFFIXES)}.",
        )
    return found


def _of_folder(
    folder: Path, config: Any, split: str | None, *, labelled: bool
) -> Iterator[ImageFile]:
    root = folder if split is None else folder / split
    if split is not None and not (_is_plain(split) and root.is_dir()):
        raise DataError(
            f"no folder of split '{escape(split)}'",
            where=escape(folder.name),
            found=listing([path.name for path in _folders(folder)], 12) or "no folder",
        )
    classes = _folders(root)
    groups = [_images(path) for path in classes]
    labels: Sequence[int | None] = [None] * len(classes)
    if labelled:
        if not any(groups):
            return
        labels = class_ids([path.name for path in classes], config, escape(root.name))
    else:
        groups.append([path for path in sorted(root.iterdir()) if _is_image(path)])
        labels = [None, *labels]
    for turn in zip_longest(*groups):
        for path, label in zip(turn, labels, strict=True):
            if path is not None:
                yield ImageFile(path=path, name=escape(path.relative_to(root)), label=label)


def class_ids(names: Sequence[str], config: Any, where: str) -> list[int]:
    """Return the class each folder holds images of.

    A folder is named like a class, or by its number. Names of neither kind stand for the classes
    in sorted order, as in ImageNet's folders, when there are as many.

    Args:
        names: of the folders, sorted.
        config: transformers config, which names the classes.
        where: what holds them, for messages.

    Raises:
        DataError: they fit no classes of the model.
    """
    by_name: Mapping[str, int] = config.label2id or {}
    if any(name in by_name for name in names):
        return [label_of(name, config, f"folder '{escape(name, 60)}'") for name in names]
    if all(name.isdecimal() for name in names):
        return [label_of(int(name), config, f"folder '{escape(name, 60)}'") for name in names]
    if len(names) == config.num_labels:
        return list(range(len(names)))
    raise DataError(
        "the folders are not the classes of the model",
        where=where,
        expected=f"{config.num_labels} folders, or folders named {listing(list(by_name), 12)}",
        found=f"{len(names)}: {listing(list(names), 12)}",
        hint="Name each folder as config.json names its class (id2label), or by its number.",
    )


def _folders(root: Path) -> list[Path]:
    return [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def _of_rows(
    path: Path, config: Any, fields: Sequence[str], split: str | None
) -> Iterator[ImageFile]:
    is_csv = path.suffix.lower() == ".csv" and split is None
    rows = _csv_rows(path, fields) if is_csv else iter_rows(path, fields, split=split)
    for row in rows:
        value, *labels = row.values
        label = None
        if labels:
            at = f"{row.name} field '{escape(fields[1], 60)}'"
            label = label_of(_number(labels[0], config) if is_csv else labels[0], config, at)
        at = f"{row.name} field '{escape(fields[0], 60)}'"
        yield ImageFile(path=_beside(path, value, at), name=row.name, label=label)


def _beside(path: Path, value: object, where: str) -> Path:
    if not isinstance(value, str) or not value:
        found = "an empty string" if value == "" else type_name(value)
        raise DataError("is no path of an image", where=where, expected="a string", found=found)
    try:
        image = path.parent / value
        if image.is_file():
            return image
    # ValueError: a NUL; OSError: a name that is too long
    except (OSError, ValueError):
        pass
    raise DataError(
        "names a file that is not there",
        where=where,
        expected="a path relative to the file that names it",
        found=f"'{escape(value, 80)}'",
    )


def _number(text: object, config: Any) -> object:
    """Return the label of a CSV cell, where every number is text."""
    is_name = text in (config.label2id or {})
    return int(text) if isinstance(text, str) and text.isdecimal() and not is_name else text


def _csv_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    label = escape(path.name)
    with opened(path, label) as raw:
        reader = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
        try:
            names = list(reader.fieldnames or ())
            for field in fields:
                if field not in names:
                    raise missing_field(field, names, label)
            for values in reader:
                name = f"{label}:{reader.line_num}"
                yield Row(name=name, values=tuple(values[field] for field in fields))
        except UnicodeDecodeError as error:
            raise DataError("is not UTF-8 text", where=label, hint="Save it as UTF-8.") from error
        except csv.Error as error:
            raise DataError("is not valid CSV", where=label, found=f"'{escape(error)}'") from error
