"""Group F of the fault catalogue, as far as it concerns the command line (recipes come later)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from adaconvert.cli.framework import LazyGroup
from adaconvert.cli.main import cli
from adaconvert.testing import tiny_models

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "cli_help.txt"


def adaconvert(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in another process."""
    command = [sys.executable, "-m", "adaconvert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("f") / "dense")


def refused(source: Path, target: Path, *options: str, by: str = "upcycle") -> str:
    """Return the last line of a refusal; nothing is written and the source is as it was."""
    before = _state(source)
    words = ("plan", "upcycle", source) if by == "plan" else ("upcycle", source, target)
    done = adaconvert(*words, *options)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert _state(source) == before
    assert [path.name for path in target.parent.iterdir() if target.name in path.name] == []
    return done.stderr.splitlines()[-1]


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


# F9: values that cannot be


@pytest.mark.parametrize("by", ["upcycle", "plan"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", "4", "--top-k", "5"), r"--top-k: more experts per token than there are"),
        (("--experts", "0"), r"--experts: must be at least 1; found 0"),
        (("--top-k", "0"), r"--top-k: must be at least 1; found 0"),
        (("--granularity", "3"), r"--granularity: granularity must be a power of two"),
        (("--granularity", "4", "--top-k", "6"), r"--top-k: must be a multiple of the granularity"),
        (("--drop", "1.5"), r"--drop: out of range; expected 0\.0 to 1\.0, found 1\.5"),
        (("--noise", "nan"), r"--noise: out of range; .* found nan"),
        (("--layers", "0-99"), r"--layers: the model has blocks 0 to 1; found 0-99"),
        (("--layers", "first"), r"--layers: cannot be read; expected indexes and ranges"),
        (("--shared-width", "8"), r"--shared-width: only means something with --shared-experts"),
        (("--max-shard-size", "big"), r"'?big'?"),
        (("--target", "mixtrall"), r"mixtral"),
    ],
)
def test_f9_impossible_value(
    dense: Path, tmp_path: Path, options: tuple[str, ...], message: str, by: str
) -> None:
    last = refused(dense, tmp_path / "out", *options, by=by)
    assert last.startswith("error: ")
    assert re.search(message, last), last


# F10: the method does not support the architecture


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_f10_architecture_without_a_host(tmp_path: Path, family: str) -> None:
    source = tiny_models.make(family, tmp_path / "source")
    last = refused(source, tmp_path / "out")
    assert last.startswith("error: ")
    assert family in last


# F13: what click refuses


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (("upcycle",), "upcycle [OPTIONS] SRC... DST", "Missing argument"),
        (("upcycle", "one"), "upcycle [OPTIONS] SRC... DST", "Missing argument 'SRC...'"),
        (("verify", "one"), "verify [OPTIONS] SRC... DST", "Missing argument"),
        (("inspect", "one", "two"), "inspect [OPTIONS] SRC", "unexpected extra argument (two)"),
        (("upcycle", "a", "b", "--expert", "8"), "upcycle [OPTIONS]", "--experts"),
        (("upcycle", "a", "b", "--experts", "eight"), "upcycle [OPTIONS]", "'eight'"),
        (("upcycle", "a", "b", "--router-init", "big"), "upcycle [OPTIONS]", "'big' is not one of"),
        (("upcycle", "a", "b", "--probe", "no-file"), "upcycle [OPTIONS]", "'no-file' does not"),
        (("upcycle", "a", "b", "--seed"), "upcycle [OPTIONS]", "requires an argument"),
        (("convert", "a", "b"), "[OPTIONS] COMMAND", "no such command 'convert'"),
        (("plan", "moe", "a"), "plan [OPTIONS] COMMAND", "no such command 'moe'"),
        (("--colour", "a"), "[OPTIONS] COMMAND", "--colour"),
    ],
)
def test_f13_usage(arguments: tuple[str, ...], usage: str, message: str) -> None:
    done = adaconvert(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    first, hint, *rest = done.stderr.splitlines()
    assert first.startswith("Usage: adaconvert ")
    assert usage in first
    assert re.fullmatch(r"Try 'adaconvert[\w ]* --help'\.", hint)
    assert message in " ".join(rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-verify", "--probe", __file__), "error: --probe does nothing with --no-verify."),
        (("--no-verify", "--memory", "1GB"), "error: --memory does nothing with --no-verify."),
        (("--router-init", "hidden"), "error: --router-prompts: --router-init hidden and"),
        (("--router-prompts", __file__), "error: --router-prompts: --router-init hidden and"),
        (("--drop-index", "shared", "--shared-width", "8"), "error: --shared-width: only means"),
    ],
)
def test_f13_conflicting_options(
    dense: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused(dense, tmp_path / "out", *options)


# F16: help


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its full name, the program itself first."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, LazyGroup):
            context = click.Context(command, info_name=name)
            for verb in command.list_commands(context):
                inner = command.get_command(context, verb)
                assert inner is not None
                yield from walk(f"{name} {verb}", inner)

    yield from walk("adaconvert", cli)


def test_f16_help_of_all_commands(update_golden: bool) -> None:
    parts = []
    for name, command in commands():
        context = click.Context(
            command, info_name=name, terminal_width=100, help_option_names=["-h", "--help"]
        )
        parts.append(f"$ {name} --help\n{command.get_help(context)}\n")
    text = "\n".join(parts)
    assert text.isascii()
    if update_golden:
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "run pytest --update-golden and read the difference"


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_f16_help_loads_nothing_heavy(name: str) -> None:
    code = (
        "import sys\n"
        "from adaconvert.cli.main import run\n"
        f"code = run({[*name.split()[1:], '--help']!r})\n"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors', 'huggingface_hub', 'triton'}\n"
        "print(code, *sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "0\n"
    assert done.stdout.startswith(f"Usage: {name} ")


def test_f16_help_is_the_same_without_a_terminal_and_in_twenty_columns() -> None:
    env = {**os.environ, "COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb"}
    done = adaconvert("upcycle", "--help", env=env)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "--experts" in done.stdout
