"""What is printed reaches any terminal, and nothing from a file steers it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from adaconvert.cli.output import printable

Child = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\x00", "a\\rb\\x00"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("caf\u00e9", "caf\u00e9"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_encoding_without_the_character(child: Child) -> None:
    env = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    process = child("return Reported('caf\\u00e9', 'odd \\udc80 name')", env=env)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "caf\\xe9\nodd \\udc80 name\n", "")


def test_json_is_ascii(child: Child) -> None:
    process = child("return Reported('caf\\u00e9')", ["inspect", "x", "--json"])
    out, _ = process.communicate(timeout=60)
    assert out.isascii()
    assert json.loads(out) == {"lines": ["caf\u00e9"]}
