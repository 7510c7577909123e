"""Taking hold of a destination before any weight is read: checks, lock, repair, journal."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adaconvert.errors import AdaconvertError
from adaconvert.io import manifest
from adaconvert.io.destination import Destination, make_parents, remove_parents
from adaconvert.io.fs import FileSystem, free_bytes, not_enough_space, reporting
from adaconvert.io.journal import CHECKPOINT_FOLDER, JOURNAL_FILE, Journal, Lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A destination this process may write.

    Attributes:
        destination: what it will be called.
        lock: of the staging folder.
        journal: of what is complete in it.
        made: folders above the destination that did not exist.
    """

    destination: Destination
    lock: Lock
    journal: Journal
    made: tuple[Path, ...]


def claim(
    fs: FileSystem,
    dst: str | Path,
    *,
    sources: Iterable[Path],
    plan_digest: str,
    overwrite: bool,
    resume: bool,
    needed_bytes: int,
    facts: Mapping[str, object],
    updating: bool = False,
) -> Claim:
    """Return the claim on a destination; see `Staging.open` for arguments and errors.

    When it raises, the disk is as it was; only an unfinished run that is not resumed is gone.
    """
    destination = Destination.resolve(dst)
    destination.check_apart(sources)
    if not os.path.lexists(destination.old):
        destination.check_free(overwrite=overwrite, updating=updating)
    made: list[Path] = []
    lock: Lock | None = None
    journal: Journal | None = None
    kept = resume and (destination.staging / JOURNAL_FILE).is_file()
    try:
        with reporting(destination.given, folder=destination.path.parent, needed=needed_bytes):
            make_parents(fs, destination.path, made)
            lock = Lock.claim(fs, destination.staging, destination.given)
            destination.settle(fs)
            destination.check_free(overwrite=overwrite, updating=updating)
            journal = _open_journal(fs, destination, lock, plan_digest, facts, resume)
            _check_space(destination, journal, needed_bytes)
    except BaseException:
        _undo(fs, lock, journal, made, remove=not kept)
        raise
    return Claim(destination=destination, lock=lock, journal=journal, made=tuple(made))


def already_committed(
    dst: str | Path, *, plan_digest: str, fs: FileSystem | None = None
) -> dict[str, object] | None:
    """Return the manifest of `dst` if a run of the same plan completed it, None otherwise.

    A run killed after its last rename has nothing left to resume: this is how the next one knows.
    What such a run left beside the destination is removed.

    Raises:
        OutputConflictError: another run is writing there.
    """
    fs = FileSystem() if fs is None else fs
    destination = Destination.resolve(dst)
    try:
        found = manifest.read(destination.path)
    except AdaconvertError:
        return None
    if found["plan_digest"] != plan_digest:
        return None
    if os.path.lexists(destination.staging) or os.path.lexists(destination.old):
        with reporting(destination.given):
            lock = Lock.claim(fs, destination.staging, destination.given)
            try:
                destination.settle(fs)
            finally:
                lock.release(remove=True)
    return found


def _open_journal(
    fs: FileSystem,
    destination: Destination,
    lock: Lock,
    plan: str,
    facts: Mapping[str, object],
    resume: bool,
) -> Journal:
    path = lock.folder / JOURNAL_FILE
    journal = Journal.reopen(fs, path, plan, facts, destination.given) if resume else None
    if journal is not None:
        _remove_unfinished(fs, lock.folder / CHECKPOINT_FOLDER, journal)
        return journal
    if _shards_in(path):
        logger.warning("%s: an unfinished run is discarded", destination.given)
    lock.clear()
    fs.mkdir(lock.folder / CHECKPOINT_FOLDER)
    return Journal.start(fs, path, plan, facts)


def _shards_in(journal: Path) -> int:
    """Return how many shards a journal names, below the line that names its plan."""
    try:
        return max(journal.read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return 0


def _remove_unfinished(fs: FileSystem, folder: Path, journal: Journal) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name not in journal.records:
            fs.unlink(folder / entry.name)


def _check_space(destination: Destination, journal: Journal, needed: int) -> None:
    left = needed - sum(record.nbytes for record in journal.records.values())
    free = free_bytes(destination.path.parent)
    if free is not None and left > free:
        raise not_enough_space(
            "the disk is too small for the output",
            destination.given,
            needed=left,
            free=free,
            hint="Free some space or choose a destination on another disk.",
        )


def _undo(
    fs: FileSystem,
    lock: Lock | None,
    journal: Journal | None,
    made: Sequence[Path],
    *,
    remove: bool,
) -> None:
    if journal is not None:
        journal.close()
    if lock is not None:
        with suppress(OSError):
            lock.release(remove=remove)
    remove_parents(fs, made)
