"""Errors that name what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from adaconvert.errors import OptionError
from adaconvert.io.names import escape


def unknown(what: str, name: str, known: Iterable[str], where: str) -> OptionError:
    """Return the error for a name that is none of those known; names the nearest one.

    Args:
        what: kind of name.
        name: the name.
        known: names there are.
        where: place and path of the name.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else None
    if hint is None and names:
        hint = f"Known: {', '.join(escape(name, 60) for name in names)}."
    return OptionError(f"unknown {what} '{escape(name, 60)}'", where=where, hint=hint)
