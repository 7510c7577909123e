"""Texts, a tiny model that knows their language, and a calibration of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adaconvert import api
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.calibrating import OPTIONS, documents, teach


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 200 documents of a language a tiny model can learn."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(documents(200, seed=0)))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adaptive model that knows the language, so that fewer neurons cost it something."""
    folder = tmp_path_factory.mktemp("trained")
    dense = tiny_models.make("llama", folder / "dense", max_shard_size="60KB")
    teach(dense, 1500)
    return make_adaptive(dense, folder / "adaptive", router="gate", experts=64)


@pytest.fixture(scope="session")
def report(
    trained: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CalibrationResult]:
    """Return a copy certified to lose no more than 0.3 nats, and what was said of it."""
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    said = api.calibrate(trained, text, destination=folder, max_loss_increase=0.3, **OPTIONS)
    return folder, said


@pytest.fixture(scope="session")
def calibrated(report: tuple[Path, CalibrationResult]) -> Path:
    """Return that copy."""
    return report[0]


@pytest.fixture
def copy(calibrated: Path, tmp_path: Path) -> Path:
    """Return another copy of it, which may be changed."""
    return Path(shutil.copytree(calibrated, tmp_path / "copy"))
