"""JSON without leniencies."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.strict_json import MAX_DEPTH, load_json, load_object


def test_values_come_back_as_json_loads_gives_them() -> None:
    assert load_json(b'{"a": [1, -2.5, null, true, "x"]}', "f", 100) == {
        "a": [1, -2.5, None, True, "x"]
    }


def test_a_byte_order_mark_is_accepted() -> None:
    assert load_json(b'\xef\xbb\xbf{"a": 1}', "f", 100) == {"a": 1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"f: is not valid JSON; found 'Expecting value' at line 1 column 1"),
        (b"{", r"f: is not valid JSON; found 'Expecting property name"),
        (b'{"a": 1} x', r"f: is not valid JSON; found 'Extra data' at line 1 column 10"),
        (b'{"a": 1, "a": 1}', r"f: duplicate key 'a'$"),
        (b'{"b": {"a": 1, "a\\u001b": 2, "a\\u001b": 3}}', r"f: duplicate key 'a\\x1b'$"),
        (b'{"a": NaN}', r"f: is not valid JSON; found the number NaN"),
        (b"[-Infinity]", r"f: is not valid JSON; found the number -Infinity"),
        (b"[1e999]", r"f: is not valid JSON; found the number 1e999"),
        (b"[" + b"1" * 5000 + b"]", r"f: is not valid JSON; found a number too long"),
        (b"\xff\xfe{\x00}\x00", r"f: is not UTF-8 text; found UTF-16"),
        (b'{"\xe9": 1}', r"f: is not UTF-8 text; found byte 0xe9 at offset 2"),
        (b"[" * 200_000, r"f: is nested too deeply; expected at most 64 levels"),
        (b"[" * 65 + b"]" * 65, r"f: is nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, r"f: is nested too deeply"),
        (b"[1" + b",1" * 100 + b"]", r"f: is too large to be read; expected at most 200 bytes"),
    ],
)
def test_leniencies_of_the_parser_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_json(raw, "f", 200 if raw.startswith(b"[1,1") else 1_000_000)


def test_the_deepest_allowed_value_passes() -> None:
    assert load_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "f", 1000)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(SourceError, match=r"at most 1000 bytes, found 1073741824"):
        load_json(path, "x.json", 1000)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"[]", "an array"),
        (b"null", "null"),
        (b"1", "a number"),
        (b"true", "a boolean"),
        (b'"s"', "a string"),
    ],
)
def test_an_object_is_demanded_where_one_is_needed(raw: bytes, found: str) -> None:
    with pytest.raises(SourceError, match=f"f: is not a JSON object; .* found {found}"):
        load_object(raw, "f", 100)
