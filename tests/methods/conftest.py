"""Tiny dense models by name and seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adaconvert.testing.tiny_models import make


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from the name of a tiny model and a seed to its folder."""
    root = tmp_path_factory.mktemp("dense")

    def source(name: str, seed: int = 0) -> Path:
        folder = root / f"{name}-{seed}"
        return folder if folder.exists() else make(name, folder, seed=seed)

    return source
