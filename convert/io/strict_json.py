"""JSON from a checkpoint, read without the leniencies of `json.load`.

Duplicate keys, NaN, infinities, deep nesting and oversized files are refused; a byte order mark is
not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.io.regular import read_whole

MAX_DEPTH = 64

Pairs = list[tuple[str, object]]


def load_json(
    source: Path | bytes,
    where: str,
    max_bytes: int,
    *,
    duplicate: Callable[[str], str] = lambda key: f"duplicate key '{key}'",
) -> object:
    """Return the value of a JSON text that is well-formed, finite, bounded and repeats no key.

    Args:
        source: a file, or its bytes.
        where: name of the file for messages.
        max_bytes: size above which nothing is read.
        duplicate: makes the message for a repeated key out of the escaped key.

    Raises:
        SourceError: the text is anything else.
        ResourceError: the file may not be read.
    """
    raw = source if isinstance(source, bytes) else read_whole(source, where, max_bytes)
    if len(raw) > max_bytes:
        raise SourceError(
            "is too large to be read",
            where=where,
            expected=f"at most {max_bytes} bytes",
            found=len(raw),
        )
    value = _parse(_decode(raw, where), where, _pairs_hook(where, duplicate))
    _check_depth(value, where)
    return value


def load_object(source: Path | bytes, where: str, max_bytes: int) -> dict[str, object]:
    """Return the value of a JSON text whose outermost value is an object.

    Raises:
        SourceError: as for `load_json`, or the outermost value is something else.
    """
    value = load_json(source, where, max_bytes)
    if not isinstance(value, dict):
        raise SourceError(
            "is not a JSON object", where=where, expected="an object", found=type_name(value)
        )
    return value


def type_name(value: object) -> str:
    """Return what JSON calls the type of `value`."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
    }
    return names.get(type(value), "an object")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "UTF-16" if utf16 else f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise SourceError("is not UTF-8 text", where=where, found=found) from None


def _parse(text: str, where: str, hook: Callable[[Pairs], object]) -> object:
    try:
        return json.loads(
            text,
            object_pairs_hook=hook,
            parse_constant=_Refuse(where),
            parse_float=_finite(where),
        )
    except json.JSONDecodeError as error:
        found = f"'{escape(error.msg)}' at line {error.lineno} column {error.colno}"
        raise SourceError("is not valid JSON", where=where, found=found) from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError:
        # Python refuses to convert integers of more than 4300 digits
        raise SourceError("is not valid JSON", where=where, found="a number too long") from None


class _Refuse:
    """Refuses NaN, Infinity and -Infinity, which Python's parser would accept."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, constant: str) -> object:
        raise SourceError("is not valid JSON", where=self.where, found=f"the number {constant}")


def _finite(where: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise SourceError("is not valid JSON", where=where, found=f"the number {escape(text)}")
        return value

    return parse


def _pairs_hook(where: str, duplicate: Callable[[str], str]) -> Callable[[Pairs], object]:
    def build(pairs: Pairs) -> object:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            # set.add returns None, so this finds the first key that was there before
            key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise SourceError(duplicate(escape(key)), where=where)
        return value

    return build


def _check_depth(value: object, where: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise _too_deep(where)


def _children(item: object) -> list[object]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


def _too_deep(where: str) -> SourceError:
    return SourceError("is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels")
