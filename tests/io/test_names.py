"""Names from files: what is safe to print, and which names are refused."""

from __future__ import annotations

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.names import check_relative_file, check_tensor_name, escape, listing


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("a\nb\r\t", "a\\nb\\r\\t"),
        ("\x1b[31mred\x00\x7f", "\\x1b[31mred\\x00\\x7f"),
        ("back\\slash", "back\\\\slash"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\ud800", "\\ud800"),
        (["a", 1], "['a', 1]"),
        (None, "None"),
        (3, "3"),
    ],
)
def test_escape_leaves_printable_ascii_only(text: object, escaped: str) -> None:
    assert escape(text) == escaped


def test_escape_cuts_to_the_limit_and_says_so() -> None:
    assert escape("a" * 200) == "a" * 200
    assert escape("a" * 201) == "a" * 197 + "..."
    assert len(escape("\x1b" * 1_000_000)) == 200
    assert len(escape([0] * 1_000_000)) < 200
    assert escape("abcdef", limit=5) == "ab..."


def test_listing_counts_what_it_does_not_show() -> None:
    assert listing(["a", "b\n"]) == "a, b\\n"
    assert listing(["a", "b", "c"], 2) == "a, b and 1 more"


@pytest.mark.parametrize("name", ["w", "a.b.0.weight", "scope/kernel:0", "h\u00e9", "x" * 512])
def test_ordinary_tensor_names_pass(name: str) -> None:
    check_tensor_name(name, "f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"f: tensor name '' is empty"),
        ("a\nb", r"f: tensor name 'a\\nb' holds control or invisible characters"),
        ("\x1b[31m", r"f: tensor name '\\x1b\[31m' holds control"),
        ("a\x00", r"f: tensor name 'a\\x00' holds control"),
        ("\u202ea", r"f: tensor name '\\u202ea' holds control or invisible"),
        ("\ud800", r"f: tensor name '\\ud800' holds control"),
        ("../../x", r"f: tensor name '\.\./\.\./x' looks like a path out of the folder"),
        ("a\\..\\b", r"looks like a path out of the folder"),
        ("/etc/passwd", r"looks like a path out of the folder"),
        ("a" * 1_000_000, r"f: tensor name 'a{197}\.\.\.' is 1000000 characters long, .* 512"),
    ],
)
def test_hostile_tensor_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        check_tensor_name(name, "f")


@pytest.mark.parametrize("path", ["model.safetensors", "sub/x.safetensors", "-x", ".hidden", "a b"])
def test_ordinary_files_pass(path: str) -> None:
    check_relative_file(path, "i")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is empty"),
        (".", "leaves its folder"),
        ("..", "leaves its folder"),
        ("../x", "leaves its folder"),
        ("a/../../x", "leaves its folder"),
        ("a/../x", "leaves its folder"),
        ("./x", "leaves its folder"),
        ("a//x", "has a part that is empty"),
        ("a/", "has a part that is empty"),
        (".. /x", "ends with a dot or space"),
        ("x.", "ends with a dot or space"),
        ("/x", "is absolute"),
        ("//host/x", "is absolute"),
        ("C:x", "is absolute or uses backslashes, drives or colons"),
        ("C:\\x", "backslashes, drives or colons"),
        ("\\\\host\\x", "backslashes, drives or colons"),
        ("..\\x", "backslashes, drives or colons"),
        ("x:stream", "backslashes, drives or colons"),
        ("nul.safetensors", "names a device"),
        ("a/COM1", "names a device"),
        ("a\x00b", "holds control"),
        ("a\nb", "holds control"),
        ("a" * 513, "is 513 characters long"),
    ],
)
def test_unsafe_files_are_refused(path: str, reason: str) -> None:
    with pytest.raises(SourceError, match=rf"^i: file name '.*' .*{reason}"):
        check_relative_file(path, "i")
