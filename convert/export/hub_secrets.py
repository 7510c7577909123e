"""What must not leave this machine in a file: access tokens, and paths that mean nothing elsewhere.

Copies of foreign files are held to less than what adaconvert wrote: a path of somebody else's
machine in a tokenizer's settings is public already, and is only mentioned.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from adaconvert.errors import TOKEN, OptionError, redacted
from adaconvert.io.names import escape

_TOKEN = re.compile(TOKEN.encode())
#: folders where people's files lie, on Linux, macOS and Windows; "\\?\\" because of JSON.
_HOMES = re.compile(
    rb"(?<![\w.~/:-])/(?:home|Users|root|mnt|workspace|scratch)/[\w.-]+"
    rb"|(?<![A-Za-z])[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+"
    rb"|(?<!\w)file:///?[\w.~-]+"
)
_WRITTEN_BY_US = re.compile(r"README\.md|adaconvert\.json|config\.json|.*\.ya?ml|.*\.(svg|csv)")
_COPIED_SETTINGS = re.compile(r".*_config\.json|special_tokens_map\.json")
_LOGIN = re.compile(r"//[^/\s@]+@")


def own_places(folder: Path) -> tuple[bytes, ...]:
    """Return the paths that would tell where `folder` lies: its parent, the home, the current one.

    Places so short that they say nothing ("/", "/root") are left out: vocabularies hold them.
    """
    places = {Path.home(), folder.absolute().parent, folder.resolve().parent, Path.cwd()}
    return tuple(os.fsencode(place) for place in sorted(places) if len(place.parts) > 2)


def faults(name: str, content: bytes, places: tuple[bytes, ...]) -> tuple[str, ...]:
    """Return why a file must not be published, nothing when it may be.

    Args:
        name: of the file in the checkpoint.
        content: all of it.
        places: what `own_places` returned.
    """
    found = []
    # JSON may write "/" as "\/"
    plain = content.replace(rb"\/", b"/")
    if _TOKEN.search(content):
        found.append("holds an access token")
    strict = _WRITTEN_BY_US.fullmatch(name) is not None
    if not strict and not _COPIED_SETTINGS.fullmatch(name):
        return tuple(found)
    path = _own(plain, places)
    if path is None and strict:
        match = _HOMES.search(plain)
        path = None if match is None else match[0]
    if path is not None:
        found.append(f"holds a path of this machine, '{_shown(path)}'")
    return tuple(found)


def remarks(name: str, content: bytes) -> tuple[str, ...]:
    """Return what the user should know about a copied file that may be published."""
    if not _COPIED_SETTINGS.fullmatch(name):
        return ()
    match = _HOMES.search(content.replace(rb"\/", b"/"))
    if match is None:
        return ()
    return (f"{escape(name)}, copied from the source, names the path '{_shown(match[0])}'",)


def _own(content: bytes, places: tuple[bytes, ...]) -> bytes | None:
    for place in places:
        # "/data" is no part of "https://example.org/data" or of "/database"
        if re.search(rb"(?<![\w.~/:-])" + re.escape(place) + rb"(?![\w.-])", content):
            return place
    return None


def _shown(path: bytes) -> str:
    return escape(path.decode("utf-8", "backslashreplace"), 80)


def holds_login(text: str) -> bool:
    """Return whether a text holds an access token, or a login inside a URL."""
    return redacted(text) != text or _LOGIN.search(text) is not None


def check_argument(option: str, value: str | None) -> None:
    """Return only when an argument holds no access token and no login inside a URL.

    Raises:
        OptionError: it does; the value is not repeated.
    """
    if value is not None and holds_login(value):
        raise OptionError(
            "holds an access token or a password, which everybody on this machine can read",
            where=option,
            hint="Log in with `hf auth login`, or set HF_TOKEN; and replace this token by a new "
            "one.",
        )
