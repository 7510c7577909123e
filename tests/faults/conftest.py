"""A tiny run, all of it in memory: the tests repeat it for every step and every name; and a hub."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaconvert.testing.faults import write_sharded
from adaconvert.testing.hub_server import client_of, serving
from adaconvert.testing.hub_state import Hub
from adaconvert.testing.sealed import seal
from adaconvert.testing.writing import Recorded, TinyRun, record, tiny_source


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs are synced here."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="adaconvert-") as name:
        yield Path(name)


@pytest.fixture
def tiny(memory: Path) -> TinyRun:
    """A run from `src` to `out` in the same folder, which holds nothing else."""
    return TinyRun(source=tiny_source(memory / "src"), destination=memory / "out")


@pytest.fixture
def quick(memory: Path) -> TinyRun:
    """A run from `src` to `new/out`; there is no folder `new`."""
    return TinyRun(source=tiny_source(memory / "src"), destination=memory / "new" / "out")


@pytest.fixture
def recorded(quick: TinyRun) -> Recorded:
    """What `quick` does when nothing disturbs it; also loads all that forked children need."""
    return record(quick)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with nothing in it; the token of this machine may write for "org"."""
    with serving() as served, client_of(served, tmp_path / "hub-cache"):
        yield served


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of three shards that may be pushed."""
    return seal(write_sharded(tmp_path / "tiny", 3))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
