"""What values of options may be; each check returns nothing or names the flag in its error."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from adaconvert.errors import OptionError
from adaconvert.io.names import escape

_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmbt]?)\s*", re.IGNORECASE)


def flag(name: str) -> str:
    """Return the command-line spelling of an option."""
    return f"--{name.replace('_', '-')}"


def among(where: str, value: str, known: Collection[str]) -> None:
    """Return only when a value is one of the known ones.

    Raises:
        OptionError: it is not.
    """
    if value not in known:
        raise OptionError(
            "is unknown", where=where, expected=" or ".join(known), found=escape(str(value))
        )


def whole(name: str, value: object, least: int) -> None:
    """Return only when the value of the option `name` is a whole number, `least` or more.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(
            "is out of range",
            where=flag(name),
            expected=f"{least} or more",
            found=escape(str(value)),
        )


def number(
    where: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Return only when a value is a finite number between `low` and `high`.

    Args:
        where: flag.
        value: anything.
        low, high: bounds, both allowed.
        open_low: `low` itself is not allowed.

    Raises:
        OptionError: it is not.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        is_number
        and isinstance(value, int | float)
        and math.isfinite(value)
        and (low < value <= high if open_low else low <= value <= high)
    ):
        return
    above = f"above {low:g}" if open_low else f"{low:g} or more"
    raise OptionError(
        "is out of range" if is_number else "is no number",
        where=where,
        expected=above if high == math.inf else f"{low:g} to {high:g}",
        found=escape(str(value)),
    )


def parse_count(text: str | int, where: str = "--tokens") -> int:
    """Return the number in `2M`, `1.5B`, `500k` or a plain number (powers of a thousand).

    Raises:
        OptionError: it is none, or less than 1.
    """
    match = _COUNT.fullmatch(str(text))
    value = 0.0
    if match:
        value = float(match[1]) * 1000.0 ** " kmbt".index(match[2].lower() or " ")
        # a fraction of one means nothing
        value = value if match[2] or value.is_integer() else 0.0
    if not 1 <= value < math.inf:
        raise OptionError(
            "is no count", where=where, expected="a number such as 20M", found=escape(str(text))
        )
    return round(value)
