"""A calibration reaches the disk whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import ResourceError
from adaconvert.evaluate import calibration
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.io import manifest
from adaconvert.testing.calibrating import OPTIONS, assert_whole
from adaconvert.testing.writing import FailingFileSystem, RecordingFileSystem, tree_digest


def _settings(text: Path) -> CalibrationSettings:
    given = {**OPTIONS, "budget": 0.8, "rules": ("top-k",), "values": (20, 40)}
    return CalibrationSettings.of([str(text)], given)


@pytest.fixture
def measured(text: Path, copy: Path) -> Callable[..., None]:
    """Return what writes a calibration that was measured once."""
    from adaconvert.evaluate import calibration_output as output

    opened = output.open_checkpoint(copy)
    report = calibration.calibrate(copy, _settings(text), destination=copy.with_name("once"))
    shutil.rmtree(copy.with_name("once"))

    def write(fs: Any = None) -> None:
        output.write(opened, report, None, fs=fs)

    return write


def test_a_full_disk_at_any_step_leaves_the_old_checkpoint_or_the_new(
    copy: Path, measured: Callable[..., None], tmp_path: Path
) -> None:
    saved = shutil.copytree(copy, tmp_path / "saved")
    old = tree_digest(copy)
    watch = RecordingFileSystem()
    measured(watch)
    new = tree_digest(copy)
    assert new != old
    for step in watch.steps:
        shutil.rmtree(copy)
        shutil.copytree(saved, copy)
        with suppress(ResourceError):
            measured(FailingFileSystem(step, errno.ENOSPC))
        assert tree_digest(copy) in (old, new), step
        assert_whole(copy)
        for left in copy.parent.glob(".*.adaconvert-*"):
            shutil.rmtree(left)


def test_a_disk_without_hard_links_gets_copies(copy: Path, measured: Callable[..., None]) -> None:
    class NoLinks(RecordingFileSystem):
        def link(self, src: Path, dst: Path) -> bool:
            return False

    before = {f.name: f.stat().st_ino for f in copy.glob("*.safetensors")}
    measured(NoLinks())
    assert_whole(copy)
    after = {f.name: f.stat().st_ino for f in copy.glob("*.safetensors")}
    assert all(after[name] != inode for name, inode in before.items())


def test_a_checkpoint_without_manifest_gets_one_elsewhere(trained: Path, calibrated: Path) -> None:
    record = manifest.read(calibrated)
    assert record["method"] == "calibrate"
    assert not (trained / manifest.MANIFEST_FILE).exists()
    assert any(str(note).startswith("calibrated: ") for note in record["notes"])  # type: ignore[attr-defined]
