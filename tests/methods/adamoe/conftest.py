"""Tiny mixtures with routers that decide clearly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adaconvert.testing.mixtures_by_case import make_mixture

Sources = Callable[..., Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return what makes a tiny mixture by name, seed and dtype, its routers scaled."""
    root = tmp_path_factory.mktemp("mixtures")

    def source(name: str, seed: int = 1, dtype: str = "float32") -> Path:
        folder = root / f"{name}-{seed}-{dtype}"
        return folder if folder.exists() else make_mixture(name, folder, seed=seed, dtype=dtype)

    return source
