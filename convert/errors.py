"""Every error a user can cause, each with the exit code the command line ends with.

One shape for all messages: *where*: *what*; expected *x*, found *y*. *What to do.*
Nothing in the package is imported from here on down, so any module may raise these.
"""

from __future__ import annotations

import os
import re

#: what an access token of the hub looks like, in text of any origin.
TOKEN = r"(?<![A-Za-z0-9])(?:hf_(?:oauth_|jwt_|app_)?|api_org_)[A-Za-z0-9]{16,}"
_TOKEN = re.compile(TOKEN)
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8


def redacted(text: str) -> str:
    """Return `text` with every access token, by its look or from the environment, blotted out."""
    for variable in _TOKEN_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, "<token>")
    return _TOKEN.sub("<token>", text)


class AdaconvertError(Exception):
    """Base of all errors adaconvert raises on purpose.

    Args:
        message: what is wrong, one clause without a final full stop.
        where: file, tensor, option or config key it is wrong in.
        expected: what should have been there.
        found: what was there.
        hint: what the user can do about it, one full sentence.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self.describe())

    def describe(self) -> str:
        """Return the whole message on one line, without access tokens."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += f"{',' if self.expected is not None else ';'} found {self.found}"
        return redacted(f"{text}. {self.hint}" if self.hint else text)


class OptionError(AdaconvertError):
    """An option or recipe value is wrong, or a method does not support the source (exit code 2)."""

    exit_code = 2


class SourceError(AdaconvertError):
    """The checkpoint that is read is damaged, incomplete or not supported (exit code 3)."""

    exit_code = 3


class DataError(AdaconvertError):
    """Text or labelled data the user named is missing, damaged or does not fit (exit code 2)."""

    exit_code = 2


class OutputConflictError(AdaconvertError):
    """The destination exists, overlaps a source or is in use by another run (exit code 4)."""

    exit_code = 4


class VerificationError(AdaconvertError):
    """The converted checkpoint is not what it was declared to be (exit code 5).

    Attributes:
        report: the whole verification report, when it got that far.
    """

    exit_code = 5
    report: object | None = None


class TrainingError(AdaconvertError):
    """A training run went wrong: a loss that is no number, or routers that collapsed (code 5)."""

    exit_code = 5


class ResourceError(AdaconvertError):
    """Disk, memory, permission or an installed version does not suffice (exit code 6)."""

    exit_code = 6


class InterruptedRunError(AdaconvertError):
    """The run was stopped by a signal (exit code 130)."""

    exit_code = 130
