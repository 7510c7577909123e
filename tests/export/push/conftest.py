"""A hub on this machine that the real client is pointed at, and a small checkpoint to push."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adaconvert.testing.faults import write_sharded
from adaconvert.testing.hub_server import client_of, serving
from adaconvert.testing.hub_state import Hub
from adaconvert.testing.sealed import seal


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with nothing in it; the token of this machine may write for "org"."""
    with serving() as served, client_of(served, tmp_path / "hub-cache"):
        yield served


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of three shards with a tokenizer, a card and a manifest."""
    folder = write_sharded(tmp_path / "tiny", 3)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}\n')
    return seal(folder)
