"""Checks every method's options share; names in messages are those of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "tuple[str, ...]": (tuple,),
}


def option(name: str) -> str:
    """Return the name an option has on the command line."""
    return "--" + name.replace("_", "-")


def check_types(config: DataclassInstance) -> None:
    """Hold every field to its annotation.

    Raises:
        OptionError: a value is of another type.
    """
    for field in fields(config):
        value: Any = getattr(config, field.name)
        kind = str(field.type).split(" | ")[0]
        if value is None and "None" in str(field.type):
            continue
        is_flag = isinstance(value, bool) and kind != "bool"
        if is_flag or not isinstance(value, _KINDS[kind]):
            raise OptionError(
                "wrong type", where=option(field.name), expected=kind, found=repr(value)
            )


def check_choice(config: object, name: str, allowed: tuple[str, ...]) -> None:
    """Hold a field to a list of words.

    Raises:
        OptionError: it is none of them.
    """
    value = getattr(config, name)
    if value not in allowed:
        raise OptionError(
            "unknown choice",
            where=option(name),
            expected=" or ".join(allowed),
            found=repr(value),
        )


def check_range(config: object, name: str, low: float, high: float) -> None:
    """Hold a number to a range; None is not looked at.

    Raises:
        OptionError: it lies outside, or is no number.
    """
    value = getattr(config, name)
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise OptionError(
            "out of range", where=option(name), expected=f"{low} to {high}", found=value
        )


def parse_layers(text: str | None, count: int) -> frozenset[int]:
    """Return the blocks a selection names.

    Args:
        text: comma-separated indexes and inclusive ranges, such as "4-20,22"; None for all.
        count: blocks of the model.

    Raises:
        OptionError: the text is malformed, empty, or names a block that does not exist.
    """
    if text is None:
        return frozenset(range(count))
    return frozenset(layer for part in text.split(",") for layer in _run(part, text, count))


def _run(part: str, text: str, count: int) -> Iterator[int]:
    match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
    if match is None:
        raise OptionError(
            "cannot be read",
            where="--layers",
            expected="indexes and ranges such as 4-20,22",
            found=repr(text[:80]),
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last or last >= count:
        raise OptionError(
            f"the model has blocks 0 to {count - 1}", where="--layers", found=part.strip()
        )
    yield from range(first, last + 1)


def divisors(number: int) -> list[int]:
    """Return every divisor of a number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest(numbers: Sequence[int], wanted: int, count: int = 6) -> list[int]:
    """Return the `count` numbers nearest to one that is wanted, ascending."""
    return sorted(sorted(numbers, key=lambda n: (abs(n - wanted), n))[:count])
