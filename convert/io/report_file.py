"""One JSON file of results: there when it is whole, and never in the place of another file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from adaconvert.errors import OutputConflictError, ResourceError
from adaconvert.io.fs import FileSystem, reporting
from adaconvert.io.names import escape


def check_report(path: Path) -> None:
    """Return only when a new file may be made at `path`; nothing is made yet.

    Raises:
        OutputConflictError: something is there, or the folder it should lie in is missing.
        ResourceError: the folder may not be written.
    """
    where = escape(path.name) or "''"
    if os.path.lexists(path):
        raise OutputConflictError(
            "exists", where=where, hint="Name a new file, or remove this one first."
        )
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputConflictError(
            "lies in a folder that does not exist", where=where, found=escape(path.parent)
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError("may not be written there", where=where, found=escape(path.parent))


def write_report(path: Path, data: object, fs: FileSystem | None = None) -> None:
    """`path` holds `data` as JSON, or nothing of it when this raises.

    Raises:
        OutputConflictError: something is there.
        ResourceError: the disk is full or may not be written.
    """
    fs = fs or FileSystem()
    check_report(path)
    folder = path.absolute().parent
    partial = folder / f".{path.name}.{os.getpid()}.adaconvert-partial"
    raw = (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    with reporting(escape(path.name), folder=folder, needed=len(raw)):
        try:
            _write(fs, partial, raw)
            fs.rename(partial, path)
        except BaseException:
            with suppress(OSError):
                fs.unlink(partial)
            raise
        fs.fsync_dir(folder)


def _write(fs: FileSystem, path: Path, raw: bytes) -> None:
    descriptor = fs.create(path)
    try:
        fs.write_at(descriptor, raw, 0)
        fs.fsync(descriptor)
    finally:
        fs.close(descriptor)
