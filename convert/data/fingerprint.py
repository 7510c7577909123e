"""What tells data that changed from data that did not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from adaconvert.data.rows import data_files, existing, is_saved, opened
from adaconvert.errors import DataError
from adaconvert.io.names import escape

#: bytes of each end of a file that are looked at when it is too large to be read for this alone.
_END = 1 << 20


def fingerprint_of(
    where: str | Path, *, split: str | None = None, commit: str | None = None, whole: bool = True
) -> str | None:
    """Return a sha256 that depends on the content and on the names below a folder.

    Args:
        where: as for `rows.iter_rows`.
        split: as for `rows.iter_rows`.
        commit: of a hub data set; without one it has no fingerprint.
        whole: hash whole files; otherwise their sizes and both ends.

    Returns:
        None for a hub data set whose commit is not known.

    Raises:
        DataError: it is missing, or holds no data.
        ResourceError: it may not be read.
    """
    path = existing(where)
    if path is None:
        return None if commit is None else _sealed(["hub", str(where), commit, split])
    try:
        if not path.is_dir():
            return _sealed(["file", path.suffix.lower(), _digest(path, path.name, whole)])
        saved = is_saved(path)
        files = _every_file(path) if saved else data_files(path, split)
        names = [file.relative_to(path).as_posix() for file in files]
        digests = [_digest(file, name, whole) for file, name in zip(files, names, strict=True)]
    except OSError as error:
        raise DataError("cannot be read", where=escape(path.name), found=error.strerror) from error
    return _sealed(["folder", split if saved else None, names, digests])


def _every_file(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _digest(path: Path, name: str, whole: bool) -> str:
    with opened(path, escape(name)) as file:
        return _whole(file) if whole else _ends(file)


def _whole(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_END):
        digest.update(piece)
    return digest.hexdigest()


def _ends(file: BinaryIO) -> str:
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    digest.update(file.read(_END))
    file.seek(max(0, size - _END))
    digest.update(file.read(_END))
    return digest.hexdigest()


def _sealed(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
