"""A stand-in for `adaconvert.api`, in this process and in others."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import pytest

import adaconvert


@dataclass
class Reported:
    """What every result of the API can do."""

    data: dict[str, object] = field(default_factory=lambda: {"b": 1, "a": [2]})
    text: list[str] = field(default_factory=lambda: ["first line", "second line"])

    def to_json(self) -> dict[str, object]:
        return self.data

    def lines(self) -> list[str]:
        return self.text


@dataclass
class StubApi:
    """Records each call; returns `result` or raises `error`."""

    result: object = field(default_factory=Reported)
    error: BaseException | None = None
    calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = field(default_factory=list)

    def function(self, name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.calls.append((name, args, kwargs))
            if self.error is not None:
                raise self.error
            return self.result

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StubApi:
    """`adaconvert.api` is a stub for the length of the test."""
    stub = StubApi()
    module = ModuleType("adaconvert.api")
    for name in ("calibrate", "convert", "evaluate", "inspect", "plan", "verify"):
        setattr(module, name, stub.function(name))
    monkeypatch.setitem(sys.modules, "adaconvert.api", module)
    monkeypatch.setattr(adaconvert, "api", module, raising=False)
    return stub


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; gives exit code, stdout and stderr."""
    from adaconvert.cli.main import run as run_command

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


STUB = """
import sys, types
import adaconvert
module = types.ModuleType("adaconvert.api")
sys.modules["adaconvert.api"] = adaconvert.api = module
def stub(*args, **kwargs):
{body}
module.convert = module.evaluate = module.inspect = module.plan = module.verify = stub
class Reported:
    def __init__(self, *text): self.text = text
    def to_json(self): return {{"lines": list(self.text)}}
    def lines(self): return list(self.text)
from adaconvert.cli.main import main
main()
"""


def _signals_as_in_a_terminal() -> None:
    # under nohup, or in a shell's background, tests inherit ignored signals
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def child() -> Callable[..., subprocess.Popen[str]]:
    """Start the command line in another process, where every API function has the body given."""

    def start(
        body: str, arguments: Sequence[str] = ("inspect", "x"), **kwargs: object
    ) -> subprocess.Popen[str]:
        indented = "\n".join("    " + line for line in body.splitlines())
        command = [sys.executable, "-c", STUB.format(body=indented), *arguments]
        kwargs = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "preexec_fn": _signals_as_in_a_terminal,
            **kwargs,
        }
        return subprocess.Popen(command, **kwargs)  # type: ignore[call-overload]

    return start
