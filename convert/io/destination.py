"""Where an output may go: never into a source, never over anything adaconvert did not write."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from adaconvert.errors import OutputConflictError
from adaconvert.io.card_file import CARD, is_edited
from adaconvert.io.fs import FileSystem, reporting
from adaconvert.io.manifest import MANIFEST_FILE, foreign_entries, is_ours
from adaconvert.io.names import escape

_STAGING: Final = ".adaconvert-partial"
_OLD: Final = ".adaconvert-old"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """An output folder and its two reserved neighbours, which share its file system.

    Attributes:
        given: as the user wrote it, escaped.
        path: where the output will be; its parent has no links.
        staging: where it grows.
        old: where the output it replaces waits for a moment.
    """

    given: str
    path: Path
    staging: Path
    old: Path

    @classmethod
    def resolve(cls, given: str | Path) -> Destination:
        """Return the destination a user named; nothing is created.

        Raises:
            OutputConflictError: no folder can have that name.
            ResourceError: a folder above it may not be searched.
        """
        shown = escape(str(given))
        with reporting(shown):
            try:
                # also refuses what cannot be encoded.
                if b"\0" in os.fsencode(given):
                    raise ValueError("it holds a null byte")
                path = _without_links(Path(given).expanduser())
            except (ValueError, RuntimeError) as error:
                raise _conflict(shown, f"is no name for a folder: {escape(error)}") from error
            limit = _longest_name(path)
        if not path.name:
            raise _conflict(shown, "is the root of the file system")
        if len(os.fsencode(path.name)) > limit:
            raise _conflict(shown, f"is longer than the {limit} bytes a name may have")
        return cls(
            given=shown,
            path=path,
            staging=path.with_name(_neighbour(path.name, _STAGING, limit)),
            old=path.with_name(_neighbour(path.name, _OLD, limit)),
        )

    def beside(self, suffix: str) -> Path:
        """Return the hidden path beside the folder that bears its name, as far as names go."""
        limit = _longest_name(self.path)
        return self.path.with_name(_neighbour(self.path.name, suffix, limit))

    def occupied(self) -> bool:
        """Return whether the folder exists and holds anything.

        Raises:
            OutputConflictError: something that is no folder of its own has the name.
            ResourceError: it may not be looked at.
        """
        with reporting(self.given):
            try:
                mode = self.path.lstat().st_mode
            except FileNotFoundError:
                return False
            except NotADirectoryError as error:
                raise _conflict(self.given, "lies below a file") from error
            if stat.S_ISLNK(mode):
                raise _conflict(self.given, "exists and is a symbolic link")
            if not stat.S_ISDIR(mode):
                raise _conflict(self.given, "exists and is not a folder")
            if os.path.ismount(self.path):
                raise _conflict(
                    self.given, "is a mount point", hint="Name a new folder inside it instead."
                )
            return next(os.scandir(self.path), None) is not None

    def check_free(self, *, overwrite: bool, updating: bool = False) -> None:
        """Return only when an output may be put here.

        Args:
            overwrite: an earlier output of adaconvert may be replaced.
            updating: what is there is only updated, and an edited card goes along.

        Raises:
            OutputConflictError: something is there, and may not be replaced.
            ResourceError: it may not be looked at.
        """
        if not self.occupied():
            return
        if not overwrite:
            raise _conflict(
                self.given,
                "exists and is not empty",
                hint="Choose another destination, or replace an earlier output with --overwrite.",
            )
        if not is_ours(self.path):
            raise _conflict(
                self.given,
                f"holds no {MANIFEST_FILE}, so adaconvert did not write it and will not replace it",
                hint="Remove the folder yourself or choose another destination.",
            )
        strange = foreign_entries(self.path)
        if strange:
            raise _conflict(
                self.given,
                f"holds '{escape(strange[0])}', which adaconvert did not write",
                hint="Move it away first: --overwrite replaces the whole folder.",
            )
        if not updating and is_edited(self.path):
            raise _conflict(
                self.given,
                f"holds a {CARD} that was edited since adaconvert wrote it",
                hint="Move it away first: --overwrite replaces the whole folder.",
            )

    def check_apart(self, sources: Iterable[Path]) -> None:
        """Return only when neither the output nor its neighbours overlap a source.

        Folders are compared by device and inode, so links and bind mounts do not hide anything.

        Raises:
            OutputConflictError: they overlap.
            ResourceError: a folder may not be looked at.
        """
        with reporting(self.given):
            above = _ids_up_from(self.path.parent)
            mine = {id for path in (self.path, self.staging, self.old) for id in _id_of(path)}
            for source in sources:
                own = _id_of(Path(os.path.realpath(source)))
                if own & set(_id_of(self.path)):
                    raise _conflict(self.given, "is the source itself")
                if own & set(above):
                    raise _conflict(self.given, "lies inside the source")
                if mine & set(_ids_up_from(Path(os.path.realpath(source)))):
                    raise _conflict(self.given, "contains the source")

    def settle(self, fs: FileSystem) -> None:
        """Finish or undo a replacement that a crash cut short; only for the holder of the lock.

        The old output is complete as long as it has its manifest, which is removed first.

        Raises:
            OutputConflictError: the reserved name is taken by something else.
        """
        if not os.path.lexists(self.old):
            return
        if self.old.is_symlink() or not self.old.is_dir():
            raise _conflict(escape(self.old.name), "is in the way and is not a folder")
        if not self.occupied() and is_ours(self.old):
            fs.rename(self.old, self.path)
            fs.fsync_dir(self.path.parent)
        else:
            fs.remove_tree(self.old, first=MANIFEST_FILE)


def make_parents(fs: FileSystem, path: Path, made: list[Path]) -> None:
    """Create every missing folder above `path`, and add each to `made`, outermost first."""
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    for folder in reversed(missing):
        # another run may create it at the same time.
        with suppress(FileExistsError):
            fs.mkdir(folder)
            made.append(folder)


def remove_parents(fs: FileSystem, made: Iterable[Path]) -> None:
    """Remove folders `make_parents` created, as far as they are empty."""
    for folder in reversed(list(made)):
        with suppress(OSError):
            fs.rmdir(folder)


def _without_links(path: Path) -> Path:
    # the last part is kept as it is, so that a link there is seen and refused.
    if path.name in {"", ".."}:
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def _longest_name(path: Path) -> int:
    for folder in path.parents:
        try:
            return os.pathconf(folder, "PC_NAME_MAX")
        except (FileNotFoundError, NotADirectoryError):
            continue
    return 255


def _neighbour(name: str, suffix: str, limit: int) -> str:
    whole = f".{name}{suffix}"
    if len(os.fsencode(whole)) <= limit:
        return whole
    tail = f"-{sha256(os.fsencode(name)).hexdigest()[:16]}{suffix}"
    head = os.fsencode(name)[: limit - len(tail) - 1]
    return f".{head.decode('utf-8', 'ignore')}{tail}"


_Id = tuple[int, int]


def _id_of(path: Path) -> set[_Id]:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {(status.st_dev, status.st_ino)}


def _ids_up_from(path: Path) -> Sequence[_Id]:
    return [id for folder in (path, *path.parents) for id in _id_of(folder)]


def _conflict(where: str, message: str, *, hint: str | None = None) -> OutputConflictError:
    return OutputConflictError(message, where=where, hint=hint)
