"""What every check of `config.adaptive` uses: the error, keys, numbers. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_LARGEST = sys.float_info.max


class AdaptiveConfigError(ValueError):
    """`config.adaptive` is not what this version of the runtime can run."""


def check_keys(where: str, found: Any, known: set[str]) -> None:
    """Refuse what is no object, or has a key that is not known."""
    if not isinstance(found, Mapping):
        raise AdaptiveConfigError(f"{where} is {type(found).__name__}, expected an object")
    unknown = sorted(set(found) - known)
    if unknown:
        raise AdaptiveConfigError(
            f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )


def is_number(found: Any) -> bool:
    """Return whether a value is a finite number, no boolean."""
    known = isinstance(found, int | float) and not isinstance(found, bool)
    # comparing works for whole numbers no float can hold, which mean nothing either
    return known and -_LARGEST <= found <= _LARGEST


def check_whole(where: str, found: Any, most: int | None, *, least: int = 1) -> None:
    """Refuse what is no whole number from `least` to `most`; None for no upper bound."""
    is_whole = isinstance(found, int) and not isinstance(found, bool)
    if not is_whole or found < least or (most is not None and found > most):
        limit = f"{least} or more" if most is None else f"{least} to {most}"
        raise AdaptiveConfigError(f"{where} is {found!r}, expected {limit}")
