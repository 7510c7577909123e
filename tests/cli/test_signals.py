"""A signal ends the run cleanly once, and at once when it comes again."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable

import pytest

from adaconvert.cli.signals import signals_raise

Child = Callable[..., subprocess.Popen[str]]

WAIT = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""
STUBBORN = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaning", flush=True)
    time.sleep(60)
"""


def _wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == text + "\n"


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (signal.SIGINT, 130, "error: interrupted"),
        (signal.SIGTERM, 143, "error: stopped by SIGTERM"),
        (signal.SIGHUP, 129, "error: stopped by SIGHUP"),
    ],
)
def test_first_signal_unwinds_and_is_told(
    child: Child, number: signal.Signals, code: int, text: str
) -> None:
    process = child(WAIT)
    _wait_for(process, "ready")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "cleaned up\n", text + "\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once(child: Child, number: signal.Signals) -> None:
    process = child(STUBBORN)
    _wait_for(process, "ready")
    process.send_signal(number)
    _wait_for(process, "cleaning")
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    # killed by the signal, which a shell reports as 128 + number
    assert (process.returncode, err) == (-number, "")


def test_an_ignored_signal_stays_ignored(child: Child) -> None:
    body = "import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nreturn Reported('alive')"
    process = child(body, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "alive\n", "")


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals_raise():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
