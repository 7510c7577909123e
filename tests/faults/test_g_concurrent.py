"""G7, G10, G11: signals, dead runs, and two runs at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.errors import InterruptedRunError, OutputConflictError, SourceError
from adaconvert.io.commit import Staging
from adaconvert.testing.writing import (
    KILLED,
    CrashingFileSystem,
    TinyConversion,
    in_child,
    tiny_source,
    tree_digest,
)


@pytest.fixture
def conversion(tmp_path: Path) -> TinyConversion:
    return TinyConversion(source=tiny_source(tmp_path / "src"), destination=tmp_path / "out")


def stop(error: BaseException, after: int) -> Callable[[int], None]:
    """Return what raises `error` once shard number `after` has been handed over."""

    def check(index: int) -> None:
        if index == after:
            raise error

    return check


def by_signal() -> InterruptedRunError:
    error = InterruptedRunError("stopped by SIGTERM")
    error.exit_code = 143
    return error


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (by_signal(), 143)], ids=["ctrl-c", "sigterm"]
)
def test_g7_what_is_complete_is_kept(
    conversion: TinyConversion, error: BaseException, code: int
) -> None:
    message = "(interrupted|stopped by SIGTERM). [12] complete shards? .* --resume to go on"
    with pytest.raises(InterruptedRunError, match=message) as caught:
        replace(conversion, after_shard=stop(error, 1)).run()
    assert caught.value.exit_code == code
    assert not conversion.destination.exists()
    assert conversion.destination.with_name(".out.adaconvert-partial").is_dir()
    assert replace(conversion, resume=True).run() in {1, 2}
    plain = replace(conversion, destination=conversion.destination.with_name("plain"))
    plain.run()
    assert tree_digest(plain.destination) == tree_digest(conversion.destination)
    assert sorted(os.listdir(plain.destination.parent)) == ["out", "plain", "src"]


def test_g7_nothing_complete_nothing_kept(conversion: TinyConversion, tmp_path: Path) -> None:
    message = "interrupted. Nothing was complete, so nothing was kept"
    with (
        pytest.raises(InterruptedRunError, match=message),
        Staging.open(
            tmp_path / "new" / "out", sources=[conversion.source], plan_digest="1" * 64
        ) as staging,
        staging.shard(conversion.layouts()[0]),
    ):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["src"]


def test_other_errors_keep_nothing(conversion: TinyConversion) -> None:
    error = SourceError("is damaged", where="model.safetensors")
    with pytest.raises(SourceError, match=r"model\.safetensors: is damaged"):
        replace(conversion, after_shard=stop(error, 1)).run()
    assert os.listdir(conversion.destination.parent) == ["src"]


def test_g10_a_dead_run_is_removed(
    conversion: TinyConversion, caplog: pytest.LogCaptureFixture
) -> None:
    assert in_child(lambda: conversion.run(CrashingFileSystem(25))) == KILLED
    staging = conversion.destination.with_name(".out.adaconvert-partial")
    (staging / "checkpoint" / "left-over.safetensors").write_bytes(b"x")
    assert conversion.run() == len(conversion.layouts())
    assert "out: an unfinished run is discarded" in caplog.text
    assert sorted(os.listdir(conversion.destination.parent)) == ["out", "src"]
    assert not (conversion.destination / "left-over.safetensors").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_g10_a_live_run_is_left_alone(
    conversion: TinyConversion, resume: bool, overwrite: bool
) -> None:
    second = replace(conversion, resume=resume, overwrite=overwrite, plan_digest="2" * 64)

    def meanwhile(index: int) -> None:
        found = f"found process {os.getpid()} on host {socket.gethostname()}"
        with pytest.raises(OutputConflictError, match="another run is writing here") as caught:
            second.run()
        assert caught.value.exit_code == 4
        assert found in str(caught.value)

    replace(conversion, after_shard=meanwhile).run()
    assert sorted(os.listdir(conversion.destination.parent)) == ["out", "src"]


def test_g11_started_together(conversion: TinyConversion) -> None:
    plain = replace(conversion, destination=conversion.destination.with_name("plain"))
    plain.run()
    for _ in range(5):
        start, go = os.pipe()
        children = [_start(conversion, start, go) for _ in range(4)]
        os.close(start)
        os.close(go)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 4, 4, 4]
        assert tree_digest(conversion.destination) == tree_digest(plain.destination)
        assert sorted(os.listdir(plain.destination.parent)) == ["out", "plain", "src"]
        for file in conversion.destination.iterdir():
            file.unlink()


def _start(conversion: TinyConversion, start: int, go: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # the end of the pipe closes for all children at once.
        os.close(go)
        os.read(start, 1)
        conversion.run()
        code = 0
    except OutputConflictError as error:
        code = error.exit_code
    finally:
        os._exit(code)
