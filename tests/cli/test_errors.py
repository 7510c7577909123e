"""One exit code for each kind of error, and one line about it."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from typing import Any

import click
import pytest

from adaconvert import errors as ours
from adaconvert.cli.errors import outcome

Run = Callable[..., tuple[int, str, str]]
Child = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ours.OptionError("bad", where="--top-k"), 2, "error: --top-k: bad"),
        (ours.SourceError("bad", expected=1, found=2), 3, "error: bad; expected 1, found 2"),
        (ours.OutputConflictError("bad", hint="Do this."), 4, "error: bad. Do this."),
        (ours.VerificationError("bad"), 5, "error: bad"),
        (ours.ResourceError("bad"), 6, "error: bad"),
        (ours.InterruptedRunError("stopped"), 130, "error: stopped"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (click.Abort(), 130, "error: interrupted"),
        (click.UsageError("wrong"), 2, "error: wrong"),
        (BrokenPipeError(), 141, ""),
        (MemoryError(), 6, "error: out of memory. Lower --memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "error: out of memory"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/y"),
            6,
            "error: x/y: no space left on device. Free some disk space.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 6, "error: x: permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), 6, "error: read-only file system. The"),
        (OSError(errno.EMFILE, "Too many open files"), 6, "error: too many open files. Raise"),
        (OSError(errno.EFBIG, "File too large"), 6, "error: file too large. The file system"),
        (OSError(errno.EIO, "Input/output error"), 6, "error: input/output error. The disk"),
        (
            ValueError("odd"),
            1,
            "error: this is a bug in adaconvert: ValueError: odd. Run again with -v",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "error: this is a bug"),
        (AssertionError(), 1, "error: this is a bug in adaconvert: AssertionError. Run again"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_table(error: BaseException, code: int, text: str) -> None:
    end = outcome(error)
    assert end.code == code
    assert end.text.startswith(text)
    assert end.is_bug == (code == 1)
    assert "\n" not in end.text


def test_every_error_of_ours_has_its_own_code() -> None:
    # unusable data is a wrong argument too, and failed training shares the code of verification
    kinds = [kind for kind in vars(ours).values() if isinstance(kind, type)]
    assert sorted(kind.exit_code for kind in kinds) == [1, 2, 2, 3, 4, 5, 5, 6, 130]


def test_bug_shows_a_traceback_only_when_asked(api: Any, run: Run) -> None:
    api.error = ZeroDivisionError("inside")
    code, out, err = run("inspect", "x")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    code, _, err = run("-v", "inspect", "x")
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert "ZeroDivisionError: inside" in err


def test_error_of_the_user_has_no_traceback_even_when_verbose(api: Any, run: Run) -> None:
    api.error = ours.SourceError("bad", where="config.json")
    assert run("-vv", "inspect", "x") == (3, "", "error: config.json: bad\n")


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("return Reported('fine')", 0, ""),
        ("raise ValueError('x')", 1, "this is a bug in adaconvert"),
        ("raise adaconvert.AdaconvertError('x')", 1, "error: x"),
        ("from adaconvert.errors import OptionError as E; raise E('x')", 2, "error: x"),
        ("from adaconvert.errors import SourceError as E; raise E('x')", 3, "error: x"),
        ("from adaconvert.errors import OutputConflictError as E; raise E('x')", 4, "error: x"),
        ("from adaconvert.errors import VerificationError as E; raise E('x')", 5, "error: x"),
        ("from adaconvert.errors import ResourceError as E; raise E('x')", 6, "error: x"),
        ("from adaconvert.errors import InterruptedRunError as E; raise E('x')", 130, "error: x"),
        ("raise OSError(28, 'No space left on device')", 6, "no space left"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("sys.exit(9)", 9, ""),
    ],
)
def test_exit_code_of_the_process(child: Child, body: str, code: int, text: str) -> None:
    process = child(body)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert text in err
    assert "Traceback" not in err
