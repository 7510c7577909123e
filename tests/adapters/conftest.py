"""Tiny dense models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert.testing import tiny_models


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what gives the folder of a tiny dense model; nobody writes into it."""
    root = tmp_path_factory.mktemp("bases")

    def get(family: str = "llama", **options: Any) -> Path:
        key = "-".join([family, *(f"{name}={value}" for name, value in sorted(options.items()))])
        folder = root / key
        if not folder.exists():
            tiny_models.make(family, folder, **options)
        return folder

    return get
