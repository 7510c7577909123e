"""The work folder of a run: what each stage was made of, what it left, and who is working in it.

.<name>.run/run.json          one entry per stage: key, status, what it left
.<name>.run/lock/             held while a run works here
.<name>.run/<source>-<stage>  folder of a stage that makes a checkpoint
.<name>.run/<stage>.json      result of a stage that makes a report
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from adaconvert.errors import AdaconvertError, OutputConflictError
from adaconvert.io.destination import Destination, make_parents, remove_parents
from adaconvert.io.fs import FileSystem, reporting
from adaconvert.io.journal import Lock
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.io.names import escape
from adaconvert.io.strict_json import load_object

STATE_FILE: Final = "run.json"
FORMAT: Final = 1
STARTED: Final = "started"
DONE: Final = "done"
_LOCK: Final = "lock"
_MAX_STATE: Final = 64 << 20


class State:
    """What a work folder knows; every change is on disk before the method returns.

    Attributes:
        folder: the work folder.
        stages: entry of each stage by name.
        source: identity of the source's files, and the token they stand for.
        placed: sha256 of the manifest of the destination this run wrote, '' for none.
    """

    def __init__(self, fs: FileSystem, folder: Path, content: Mapping[str, Any]) -> None:
        self._fs = fs
        self.folder = folder
        self.stages: dict[str, dict[str, Any]] = dict(content.get("stages", {}))
        self.source: dict[str, Any] = dict(content.get("source", {}))
        self.placed: str = str(content.get("placed", ""))

    @classmethod
    def peek(cls, folder: Path, fs: FileSystem | None = None) -> State:
        """Return what is known about a work folder, which need not exist; nothing is made.

        Raises:
            OutputConflictError: it is there and no run made it.
        """
        fs = fs or FileSystem()
        with reporting(escape(folder.name)):
            if not os.path.lexists(folder):
                return cls(fs, folder, {})
            if folder.is_symlink() or not folder.is_dir():
                raise _in_the_way(folder, "is not a folder")
            if not os.path.lexists(folder / STATE_FILE):
                strange = sorted(set(os.listdir(folder)) - {_LOCK})
                if strange:
                    raise _in_the_way(folder, f"holds '{escape(strange[0])}'")
                return cls(fs, folder, {})
        return cls(fs, folder, _content(folder))

    @classmethod
    @contextmanager
    def hold(cls, folder: Path, fs: FileSystem | None = None) -> Iterator[State]:
        """Yield the state of a work folder that no other run works in meanwhile.

        Raises:
            OutputConflictError: another run holds it, or no run made it.
            ResourceError: it cannot be written.
        """
        fs = fs or FileSystem()
        cls.peek(folder, fs)
        made: list[Path] = []
        with reporting(escape(folder.name)):
            make_parents(fs, folder / _LOCK, made)
            lock = Lock.claim(fs, folder / _LOCK, escape(folder.name))
        try:
            # only now nobody else changes it
            yield cls.peek(folder, fs)
        finally:
            with suppress(OSError):
                lock.release(remove=True)
            remove_parents(fs, made)

    def start(self, name: str, key: str, folder: str) -> None:
        """Record that a stage begins."""
        self.stages[name] = {"key": key, "status": STARTED, "folder": folder}
        self._save()

    def finish(self, name: str, left: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Record that a stage is done.

        Args:
            name: the stage.
            left: identity of what it left, from `identity`.
            facts: what the summary says of it.
        """
        entry = self.stages[name]
        self.stages[name] = {**entry, "status": DONE, "left": dict(left), "facts": dict(facts)}
        self._save()

    def remember_placed(self, manifest: str) -> None:
        """Record the manifest of the destination."""
        self.placed = manifest
        self._save()

    def is_intact(self, name: str) -> bool:
        """Return whether what a finished stage left is still there, unchanged."""
        entry = self.stages.get(name, {})
        if entry.get("status") != DONE:
            return False
        if not entry.get("folder"):
            return True
        return bool(identity(self.folder / str(entry["folder"])) == entry.get("left"))

    def token(self, name: str) -> str:
        """Return what stands for the result of a finished stage in the keys of later ones."""
        return str(self.stages[name].get("left", {}).get("sha256", ""))

    def remove(self, path: Path) -> None:
        """Remove a folder or file a stage left under another name."""
        with reporting(escape(path.name)):
            if path.is_dir() and not path.is_symlink():
                self._fs.remove_tree(path, first=MANIFEST_FILE)
            elif os.path.lexists(path):
                self._fs.unlink(path)

    def _save(self) -> None:
        content = {
            "format": FORMAT,
            "stages": self.stages,
            "source": self.source,
            "placed": self.placed,
        }
        raw = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
        partial = self.folder / f".{STATE_FILE}.partial"
        with reporting(escape(self.folder.name), folder=self.folder, needed=len(raw)):
            if os.path.lexists(partial):
                self._fs.unlink(partial)
            descriptor = self._fs.create(partial)
            try:
                self._fs.write_at(descriptor, raw, 0)
                self._fs.fsync(descriptor)
            finally:
                self._fs.close(descriptor)
            self._fs.rename(partial, self.folder / STATE_FILE)
            self._fs.fsync_dir(self.folder)


def folder_of(destination: Path) -> Path:
    """Return where the work folder of a destination lies unless another is named."""
    return Destination.resolve(destination).beside(".run")


def identity(path: Path) -> dict[str, Any]:
    """Return what tells whether a stage's folder or report is still the one that was written.

    The manifest holds the hash of everything; sizes and times tell whether that still holds.
    """
    try:
        if path.is_file():
            return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        raw = (path / MANIFEST_FILE).read_bytes()
        files = {
            entry.name: [entry.stat().st_size, entry.stat().st_mtime_ns]
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name)
        }
    except OSError:
        return {}
    return {"sha256": hashlib.sha256(raw).hexdigest(), "files": files}


def _content(folder: Path) -> dict[str, Any]:
    where = f"{escape(folder.name)}/{STATE_FILE}"
    try:
        found: dict[str, Any] = load_object(folder / STATE_FILE, where, _MAX_STATE)
    except AdaconvertError as error:
        raise OutputConflictError(
            "is damaged", where=where, hint="Remove the work folder, or name another with --work."
        ) from error
    stages = found.get("stages")
    entries = list(stages.values()) if isinstance(stages, dict) else [None]
    if found.get("format") != FORMAT or not all(isinstance(entry, dict) for entry in entries):
        raise OutputConflictError(
            "was written by another version of adaconvert",
            where=where,
            hint="Remove the work folder, or name another with --work.",
        )
    return found


def _in_the_way(folder: Path, what: str) -> OutputConflictError:
    return OutputConflictError(
        f"cannot be the work folder: it {what}",
        where=escape(folder.name),
        hint="Name another with --work.",
    )
