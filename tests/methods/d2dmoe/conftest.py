"""A text, and what converts a tiny Llama with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.testing.projections import QUICK
from adaconvert.testing.tiny_models import make

TEXT = "def route(token, experts):\n    return sorted(experts, key=lambda e: e.score(token))[:2]\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * (i + 2)}) + "\n" for i in range(8)))
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[..., Path]:
    """Return what converts a tiny Llama by options, each only once."""
    root = tmp_path_factory.mktemp("made")
    source = make("llama", root / "m")

    def get(**options: Any) -> Path:
        if not options:
            return source
        folder = root / "-".join(f"{key}={value}" for key, value in options.items())
        if not folder.exists():
            api.d2dmoe(source, folder, data=str(data), **{**QUICK, **options})
        return folder

    return get
