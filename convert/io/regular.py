"""Opening files that may be anything: only regular ones are, so nothing hangs or has effects."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaconvert.errors import AdaconvertError, OptionError, ResourceError, SourceError
from adaconvert.io.names import escape

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@contextmanager
def open_regular(path: Path, where: str) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a read-only descriptor of a regular file and its status; closed on exit.

    Links are followed. The kind is checked before the open, because opening a device may have
    effects, and again after it; O_NONBLOCK keeps a FIFO put there in between from hanging.

    Args:
        path: the file.
        where: how messages name it.

    Raises:
        SourceError: it is missing, a dangling link or link loop, or no regular file.
        ResourceError: the system refuses to open it.
    """
    try:
        _check_kind(os.stat(path), where)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise _open_error(error, path, where) from error
    try:
        status = os.fstat(descriptor)
        _check_kind(status, where)
        yield descriptor, status
    finally:
        os.close(descriptor)


def pread_exact(descriptor: int, nbytes: int, offset: int, where: str) -> bytes:
    """Return exactly `nbytes` bytes of a file at `offset`.

    Raises:
        SourceError: the file ends before.
        ResourceError: the system fails to read it.
    """
    pieces = []
    while nbytes > 0:
        try:
            piece = os.pread(descriptor, nbytes, offset)
        except OSError as error:
            reason = error.strerror or "input/output error"
            raise ResourceError(f"cannot be read: {reason}", where=where) from error
        if not piece:
            raise SourceError(
                "source changed while reading",
                where=where,
                expected=f"{nbytes} bytes at offset {offset}",
                found="the end of the file",
                hint="Stop whatever writes to the source folder and run again.",
            )
        pieces.append(piece)
        nbytes -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_whole(path: Path, where: str, max_bytes: int) -> bytes:
    """Return the contents of a regular file of at most `max_bytes` bytes; a larger one is not read.

    Raises:
        SourceError: it is larger, missing, no regular file, or shrinks while it is read.
        ResourceError: the system refuses to read it.
    """
    with open_regular(path, where) as (descriptor, status):
        if status.st_size > max_bytes:
            raise SourceError(
                "is too large to be read",
                where=where,
                expected=f"at most {max_bytes} bytes",
                found=status.st_size,
            )
        return pread_exact(descriptor, status.st_size, 0, where)


def read_text(path: Path, option: str, max_bytes: int) -> str:
    """Return the text of a small file the user named in an option.

    Args:
        path: a regular UTF-8 file.
        option: the option, for the error.
        max_bytes: a larger file is not read.

    Raises:
        OptionError: it is larger, missing, no regular file or no UTF-8 text.
        ResourceError: the system refuses to read it.
    """
    try:
        return read_whole(path, option, max_bytes).decode("utf-8")
    except SourceError as error:
        raise OptionError(
            error.message, where=option, expected=error.expected, found=error.found
        ) from error
    except UnicodeDecodeError as error:
        raise OptionError(
            "is not UTF-8 text", where=option, hint="Save it as UTF-8 text."
        ) from error


def _check_kind(status: os.stat_result, where: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
    raise SourceError("is not a regular file", where=where, found=kind)


def _open_error(error: OSError, path: Path, where: str) -> AdaconvertError:
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "Give this user read access, or run as the owner."
        return ResourceError("no permission to read it", where=where, found=_mode(path), hint=hint)
    if error.errno == errno.ELOOP:
        return SourceError(
            "is a symbolic link that leads back to itself", where=where, found=_target(path)
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if path.is_symlink():
            hint = "Fetch the file again; in a hub cache, its blob is gone."
            found = _target(path)
            return SourceError("is a dangling symbolic link", where=where, found=found, hint=hint)
        return SourceError("file is missing", where=where)
    return ResourceError(f"cannot be opened: {error.strerror or 'unknown error'}", where=where)


def _target(path: Path) -> str:
    return f"a link to '{escape(os.readlink(path))}'"


def _mode(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "a folder that may not be searched"
    mode = stat.S_IMODE(status.st_mode)
    return f"mode {mode:04o} of uid {status.st_uid}, this is uid {os.geteuid()}"
