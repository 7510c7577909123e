"""What README says is what the code does: commands parse, lists are complete, files exist."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import adaconvert
from adaconvert import errors
from adaconvert.arch.host import HOSTS
from adaconvert.arch.registry import FAMILIES
from adaconvert.cli.framework import LazyGroup
from adaconvert.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    for line in block.splitlines()
    if language == "" and line.startswith("adaconvert ")
]


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Parse a command line as the program would, running nothing."""
    if isinstance(command, LazyGroup):
        context = click.Context(
            command, info_name=command.name, parent=parent, **command.context_settings
        )
        name, inner, _ = command.resolve_command(context, words)
        assert name is not None
        assert inner is not None
        parse(inner, words[1:], context)
        return
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(command.name, words, parent=parent)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse(cli, shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("script", re.findall(r"^(scripts/\S+)", README, re.MULTILINE))
def test_script_exists(script: str) -> None:
    assert (ROOT / script).is_file()


def test_python_block_calls_the_api_as_it_is() -> None:
    (block,) = (block for language, block in BLOCKS if language == "python")
    called = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("adaconvert."):
            name = ast.unparse(node.func).removeprefix("adaconvert.")
            called.add(name)
            keywords = {str(word.arg): None for word in node.keywords}
            signature = inspect.signature(getattr(adaconvert, name))
            signature.bind(*("x" for _ in node.args), **keywords)
    assert called == {"convert", "inspect", "plan", "verify"}


def _list_after(words: str) -> set[str]:
    found = re.search(rf"{re.escape(words)}: ([\w,\s]+)\.", README)
    assert found is not None
    return {name.strip() for name in found[1].split(",")}


def test_families_and_hosts_are_the_registered_ones() -> None:
    assert _list_after("Hosts (architectures of the result)") == set(HOSTS)
    dense = {name for name, family in FAMILIES.items() if family.routing is None}
    assert _list_after("Dense families") == dense


def test_every_exit_code_is_in_the_table() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert listed == {0, 141, *(kind.exit_code for kind in kinds)}


def test_floors_are_those_of_the_package() -> None:
    from adaconvert.cli.versions import FLOORS

    (line,) = re.findall(r"Floors: ([^;]+);", README)
    for name, version in re.findall(r"(\w+) (\d+\.\d+)", line):
        assert FLOORS[name][0] == version


def test_only_ascii() -> None:
    assert README.isascii()
