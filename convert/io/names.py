"""Names that come from a checkpoint: made safe to print, and refused when they are no plain names.

Checks are lexical, under POSIX and Windows rules together. Links are never resolved here: the files
of a hub cache are links that leave their folder on purpose.
"""

from __future__ import annotations

import re
import reprlib

from adaconvert.errors import SourceError

MAX_NAME = 512
_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
)


def escape(text: object, limit: int = 200) -> str:
    """Return `text` as printable ASCII of at most `limit` characters, control characters escaped.

    The result is safe in a terminal, a log line and a message; a cut text ends with "...".
    """
    if isinstance(text, tuple):
        text = list(text)
    raw = reprlib.repr(text) if isinstance(text, (dict, list)) else str(text)
    # a name may be a megabyte long: cut before escaping, which never shortens
    safe = raw[: limit + 1].encode("unicode_escape", "surrogatepass").decode("ascii")
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def listing(names: list[str], limit: int = 50) -> str:
    """Return escaped `names` joined by commas, the ones beyond `limit` only counted."""
    shown = ", ".join(escape(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def check_tensor_name(name: str, where: str) -> None:
    """Return only when `name` is a printable, bounded name that no path could be made of.

    Raises:
        SourceError: the name is empty, longer than 512 characters, holds control characters or
            is a path that climbs.
    """
    reason = _tensor_name_fault(name)
    if reason:
        raise SourceError(f"tensor name '{escape(name)}' {reason}", where=where)


def _tensor_name_fault(name: str) -> str | None:
    if not name:
        return "is empty"
    if len(name) > MAX_NAME:
        return f"is {len(name)} characters long, the limit is {MAX_NAME}"
    if not name.isprintable():
        return "holds control or invisible characters"
    if name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
        return "looks like a path out of the folder"
    return None


def check_relative_file(path: str, where: str) -> None:
    """Return only when `path` is a plain relative path with "/" between its parts, on every system.

    Raises:
        SourceError: the path is empty, absolute, climbs, names a drive, a device or a stream.
    """
    reason = _relative_file_fault(path)
    if reason:
        raise SourceError(f"file name '{escape(path)}' {reason}", where=where)


def _relative_file_fault(path: str) -> str | None:
    if not path:
        return "is empty"
    if len(path) > MAX_NAME:
        return f"is {len(path)} characters long, the limit is {MAX_NAME}"
    if not path.isprintable():
        return "holds control or invisible characters"
    if path.startswith("/") or "\\" in path or ":" in path:
        return "is absolute or uses backslashes, drives or colons"
    return next(filter(None, map(_part_fault, path.split("/"))), None)


def _part_fault(part: str) -> str | None:
    # Windows drops trailing dots and spaces, so ".. " climbs there
    if part.rstrip(". ") != part or not part:
        return "leaves its folder or has a part that is empty or ends with a dot or space"
    if part.split(".")[0].strip().lower() in _WINDOWS_DEVICES:
        return "names a device"
    return None
