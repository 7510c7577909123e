"""Every change adaconvert makes to a disk, one method each.

Nothing else in the package creates, writes, renames or removes a file of an output. Tests subclass
`FileSystem` and stop it, or fill its disk, before each step in turn.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from adaconvert.errors import AdaconvertError, OutputConflictError, ResourceError
from adaconvert.units import human_bytes

#: largest number of bytes handed to the kernel in one copy call; keeps Ctrl-C responsive.
COPY_CHUNK: Final = 256 << 20

_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
_UNLINKABLE: Final = _UNSUPPORTED | {errno.EPERM, errno.EXDEV, errno.EMLINK}
_PLAIN: Final = {
    errno.ENOSPC: ("no space left on the disk", "Free some space or choose another destination."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space or choose another destination."),
    errno.EFBIG: (
        "the file would be larger than the limit for one file",
        "Lower --max-shard-size, or raise the limit (ulimit -f).",
    ),
    errno.EIO: ("the disk reports an input/output error", "Check the disk, then run again."),
    errno.EMFILE: ("too many open files", "Raise the limit (ulimit -n)."),
    errno.ENFILE: ("too many open files on this machine", "Close some programs, then run again."),
    errno.EACCES: ("permission denied", "Choose a destination you may write to."),
    errno.EPERM: ("operation not permitted", "Choose a destination you may write to."),
    errno.EROFS: ("the file system is read-only", "Choose a destination you may write to."),
}


class FileSystem:
    """The real disk. Subclasses override `step` to watch or stop every change."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def step(self, action: str, subject: str, nbytes: int = 0) -> None:
        """Do nothing; called before each change with what will be done to which path."""

    def name_of(self, fd: int) -> str:
        """Return the path an open file was created under."""
        return self._names.get(fd, "")

    def mkdir(self, path: Path) -> None:
        """Create one folder with the mode the umask allows."""
        self.step("mkdir", str(path))
        os.mkdir(path, 0o777)

    def create(self, path: Path) -> int:
        """Create a file that did not exist, with the umask's mode, and return its descriptor."""
        self.step("create", str(path))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return self._named(os.open(path, flags, 0o666), path)

    def reopen(self, path: Path) -> int:
        """Open an existing regular file for reading and writing; nothing changes."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return self._named(os.open(path, flags), path)

    def close(self, fd: int) -> None:
        """Close a descriptor made by `create` or `reopen`."""
        self._names.pop(fd, None)
        os.close(fd)

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset` of the file."""
        view = memoryview(data)
        # a shape with a zero cannot be cast.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        self.step("write", self.name_of(fd), len(view))
        while view:
            written = os.pwrite(fd, view[:COPY_CHUNK], offset)
            if written == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view = view[written:]
            offset += written

    def copy_range(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        """Copy up to `nbytes` inside the kernel and return how many were copied."""
        self.step("copy", self.name_of(dst), nbytes)
        return os.copy_file_range(src, dst, min(nbytes, COPY_CHUNK), src_offset, offset)

    def send_range(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        """Do as `copy_range`, with `sendfile`; moves the file position of `dst`."""
        self.step("copy", self.name_of(dst), nbytes)
        os.lseek(dst, offset, os.SEEK_SET)
        return os.sendfile(dst, src, src_offset, min(nbytes, COPY_CHUNK))

    def allocate(self, fd: int, nbytes: int) -> None:
        """Give a new file its final size, and its disk blocks where they can be reserved."""
        self.step("allocate", self.name_of(fd), nbytes)
        if nbytes == 0:
            return
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
            os.ftruncate(fd, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Cut or extend a file to `nbytes`."""
        self.step("truncate", self.name_of(fd))
        os.ftruncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        """Make the contents of a file survive a power cut."""
        self.step("fsync", self.name_of(fd))
        os.fsync(fd)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a folder survive a power cut."""
        self.step("fsync_dir", str(path))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # some network file systems cannot sync a folder; they order renames themselves.
            if error.errno not in _UNSUPPORTED:
                raise
        finally:
            os.close(fd)

    def rename(self, src: Path, dst: Path) -> None:
        """Give a file or folder another name, atomically."""
        self.step("rename", f"{src} -> {dst}")
        os.rename(src, dst)

    def link(self, src: Path, dst: Path) -> bool:
        """Give a file a second name and return whether this disk can do so."""
        self.step("link", f"{src} -> {dst}")
        try:
            os.link(src, dst, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _UNLINKABLE:
                raise
            return False
        return True

    def unlink(self, path: Path) -> None:
        """Remove one file or link."""
        self.step("unlink", str(path))
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove one empty folder."""
        self.step("rmdir", str(path))
        os.rmdir(path)

    def remove_tree(self, path: Path, *, first: str | None = None) -> None:
        """Remove a folder and all in it, `first` before anything else; links are not followed."""
        entries = sorted(os.scandir(path), key=lambda entry: (entry.name != first, entry.name))
        for entry in entries:
            child = path / entry.name
            if entry.is_dir(follow_symlinks=False):
                self.remove_tree(child)
            else:
                self.unlink(child)
        self.rmdir(path)

    def lock(self, fd: int) -> bool:
        """Take an exclusive lock on an open file and return whether that was possible at once."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _named(self, fd: int, path: Path) -> int:
        self._names[fd] = str(path)
        return fd


def free_bytes(folder: Path) -> int | None:
    """Return how many bytes an ordinary user may still write at `folder`; None when unknown.

    Where the folder does not exist yet, the nearest one above it tells.
    """
    for place in (folder, *folder.parents):
        with suppress(OSError):
            stat = os.statvfs(place)
            return stat.f_bavail * stat.f_frsize
    return None


def resource_error(
    error: OSError, where: str, *, needed: int | None = None, folder: Path | None = None
) -> AdaconvertError:
    """Return the error a user should see instead of `error`."""
    number = error.errno or 0
    if number == errno.ENAMETOOLONG:
        return OutputConflictError(
            "the path is too long for this file system",
            where=where,
            hint="Choose a shorter destination.",
        )
    message, hint = _PLAIN.get(number, (os.strerror(number) if number else str(error), None))
    if number not in {errno.ENOSPC, errno.EDQUOT}:
        return ResourceError(message, where=where, hint=hint)
    free = None if folder is None else free_bytes(folder)
    return not_enough_space(message, where, needed=needed, free=free, hint=hint)


def not_enough_space(
    message: str, where: str, *, needed: int | None, free: int | None, hint: str | None
) -> ResourceError:
    """Return the error for a full disk, with the numbers that are known."""

    def shown(nbytes: int | None) -> str | None:
        return None if nbytes is None else f"{human_bytes(nbytes)} ({nbytes} bytes) free"

    return ResourceError(message, where=where, expected=shown(needed), found=shown(free), hint=hint)


@contextmanager
def reporting(
    where: str,
    *,
    folder: Path | None = None,
    needed: int | None = None,
) -> Iterator[None]:
    """Turn an OSError of the body into a ResourceError that names `where`, needed and free bytes.

    Raises:
        ResourceError: the body ran out of space, permission, descriptors or met a broken disk.
        OutputConflictError: a path was too long.
    """
    try:
        yield
    except OSError as error:
        raise resource_error(error, where, needed=needed, folder=folder) from error
