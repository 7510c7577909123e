"""The only place that prints: results go to stdout, everything else to stderr.

Text is made safe for a terminal: control characters in a hostile name are shown, not obeyed.
"""

from __future__ import annotations

import json
import re
import sys
from io import TextIOWrapper
from typing import Protocol

from adaconvert.errors import redacted

# C0 except newline and tab, DEL, C1, and the marks that reorder text on screen
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


class Report(Protocol):
    """What every result of `adaconvert.api` can do."""

    def to_json(self) -> dict[str, object]:
        """Return JSON values only."""
        ...

    def lines(self) -> list[str]:
        """Return the text a person reads."""
        ...


def printable(text: str) -> str:
    """Return `text` without access tokens, what could steer a terminal spelled out."""
    safe = _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    return redacted(safe)


def prepare_streams() -> None:
    """Characters that the terminal's encoding lacks are spelled out instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(report: Report, *, as_json: bool) -> None:
    """The report is on stdout, as one JSON document or as lines."""
    if as_json:
        print(redacted(json.dumps(report.to_json(), indent=2, sort_keys=True)))
        return
    for line in report.lines():
        print(printable(line))


def show_text(text: str) -> None:
    """`text`, which click or this package wrote, is on stdout."""
    print(printable(text))


def complain(text: str) -> None:
    """`text` is on stderr; nowhere when stderr is closed."""
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr)


def flush() -> None:
    """Everything printed has reached its reader, or the write raised."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def settle_streams() -> None:
    """What is buffered is written or given up, so the interpreter's own last flush succeeds."""
    import os

    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except OSError:
                os.dup2(sink, stream.fileno())
    finally:
        os.close(sink)
