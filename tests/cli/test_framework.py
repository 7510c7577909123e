"""Verbs are imported on demand, and the nearest one is suggested."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from adaconvert import __version__
from adaconvert.cli.framework import Argument, Command, Option
from adaconvert.cli.main import VERBS

Run = Callable[..., tuple[int, str, str]]


def test_help_imports_no_verb() -> None:
    code = (
        "import sys\n"
        "from adaconvert.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        "print(*sorted(m for m in sys.modules if m.startswith('adaconvert.cli.')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {verb.module for verb in VERBS.values()} & loaded


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("upcyle", "error: no such command 'upcyle'. Did you mean 'upcycle'?"),
        ("zzz", f"error: no such command 'zzz'. Commands: {', '.join(VERBS)}."),
    ],
)
def test_unknown_command_names_the_nearest(run: Run, typed: str, message: str) -> None:
    code, out, err = run(typed)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == message
    assert err.startswith("Usage: adaconvert [OPTIONS] COMMAND [ARGS]...\n")


def test_unknown_method_of_plan(run: Run) -> None:
    code, _, err = run("plan", "upcycl", "x")
    assert code == 2
    assert "no such command 'upcycl'. Did you mean 'upcycle'?" in err
    assert "Try 'adaconvert plan --help'." in err


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"adaconvert {__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("plan",)])
def test_no_command_shows_the_help_and_fails(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_help_lists_sections_in_the_order_of_declaration() -> None:
    @click.command("demo", cls=Command)
    @click.argument("place", cls=Argument, metavar="PLACE", describe="Where.")
    @click.option("--two", cls=Option, section="late", help="Second.")
    @click.option("--one", cls=Option, section="early", help="First.")
    def demo(place: str, two: str, one: str) -> None:
        """Do it."""

    text = demo.get_help(click.Context(demo, info_name="demo"))
    order = [text.index(word) for word in ("Arguments:", "Late:", "Early:", "Other:")]
    assert order == sorted(order)
    assert "Where." in text
    assert "--help" in text[order[3] :]
