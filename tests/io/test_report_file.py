"""A report file is there when it is whole, and replaces nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adaconvert.errors import OutputConflictError, ResourceError
from adaconvert.io.fs import FileSystem
from adaconvert.io.report_file import check_report, write_report


def test_written_whole_and_sorted(tmp_path: Path) -> None:
    write_report(tmp_path / "a.json", {"b": 1, "a": [None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    null\n  ],\n  "b": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_refusals_come_first(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    os.symlink("nowhere", tmp_path / "link")
    for name in ("there", "link"):
        with pytest.raises(OutputConflictError, match=rf"{name}: exists\. Name a new file"):
            write_report(tmp_path / name, {})
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(OutputConflictError, match="lies in a folder that does not exist"):
        check_report(tmp_path / "none" / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]


def test_nothing_is_left_when_a_step_fails(tmp_path: Path) -> None:
    steps: list[str] = []

    class Watching(FileSystem):
        stop_at = 99

        def step(self, action: str, subject: str, nbytes: int = 0) -> None:
            if action == "unlink":
                return
            if len(steps) == self.stop_at:
                raise OSError(errno.ENOSPC, "full")
            steps.append(action)

    write_report(tmp_path / "whole.json", {}, Watching())
    names = list(steps)
    assert names == ["create", "write", "fsync", "rename", "fsync_dir"]
    for stop in range(4):
        steps.clear()
        failing = Watching()
        failing.stop_at = stop
        with pytest.raises(ResourceError, match=r"a\.json: no space left on the disk"):
            write_report(tmp_path / "a.json", {"a": 1}, failing)
        assert [p.name for p in tmp_path.iterdir()] == ["whole.json"]


def test_infinite_numbers_are_a_bug_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(tmp_path / "a.json", {"a": float("inf")})
    assert list(tmp_path.iterdir()) == []
