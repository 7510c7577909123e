"""The one table from an exception to an exit code and what is said about it."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import click

from adaconvert.errors import AdaconvertError

#: operating-system errors that mean the machine does not suffice, and what the user can do.
_RESOURCES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your disk quota",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow a file of this size",
    errno.EACCES: "check who may read and write there",
    errno.EPERM: "check who may read and write there",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no open files left",
    errno.EIO: "the disk or the network file system failed",
    errno.ENOMEM: "free some memory",
}
BUG = 1
USAGE = 2
RESOURCES = 6
INTERRUPTED = 130
PIPE_CLOSED = 141


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ends: exit code, text for stderr (may be empty), whether it is our fault."""

    code: int
    text: str
    is_bug: bool = False


def outcome(error: BaseException) -> Outcome:
    """Return how a run that raised `error` ends."""
    match error:
        case AdaconvertError():
            return Outcome(code=error.exit_code, text=f"error: {error.describe()}")
        case click.UsageError():
            return Outcome(code=USAGE, text=_usage(error))
        case click.ClickException():
            return Outcome(code=USAGE, text=f"error: {error.format_message()}")
        case KeyboardInterrupt() | click.Abort():
            return Outcome(code=INTERRUPTED, text="error: interrupted")
        case BrokenPipeError():
            return Outcome(code=PIPE_CLOSED, text="")
        case OSError() if error.errno in _RESOURCES:
            return Outcome(code=RESOURCES, text=_operating_system(error))
        case MemoryError():
            return _out_of_memory()
        case RuntimeError() if _is_allocation_failure(error):
            return _out_of_memory()
    return Outcome(code=BUG, text=_bug(error), is_bug=True)


def _usage(error: click.UsageError) -> str:
    text = f"error: {error.format_message()}"
    if error.ctx is None:
        return text
    help_line = f"Try '{error.ctx.command_path} --help'."
    return f"{error.ctx.get_usage()}\n{help_line}\n{text}"


def _operating_system(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename is not None else ""
    reason = (error.strerror or type(error).__name__).lower()
    advice = _RESOURCES[error.errno or 0]
    return f"error: {place}{reason}. {advice[0].upper()}{advice[1:]}."


def _is_allocation_failure(error: RuntimeError) -> bool:
    # torch raises a plain RuntimeError when the CPU allocator fails, its own class on accelerators
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _out_of_memory() -> Outcome:
    text = "error: out of memory. Lower --memory, so that fewer layers are held at a time."
    return Outcome(code=RESOURCES, text=text)


def _bug(error: BaseException) -> str:
    kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"error: this is a bug in adaconvert: {kind}. Run again with -v for the traceback."
