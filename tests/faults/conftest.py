"""A tiny run, all of it in memory: the tests repeat it for every step and every name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
