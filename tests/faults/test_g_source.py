"""A16, A17: a source that is written to while it is converted ends the run, and nothing is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.testing.writing import (
    HookedFileSystem,
    Recorded,
    RecordingFileSystem,
    Step,
    TinyRun,
    is_new_shard,
    tree_digest,
)

#: when the shards were written, in ns; a change takes place long after it.
LONG_AGO = 10**18


def rewrite(path: Path) -> None:
    """Change the last value; the file keeps its inode and its size."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")


def replace_file(path: Path) -> None:
    """Put another file of the same size and age in its place."""
    data = path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(data[:-4] + b"\0\0\0\1")
    os.utime(other, ns=(LONG_AGO, LONG_AGO))
    other.rename(path)


def truncate(path: Path) -> None:
    """Leave the header and the beginning of the data."""
    os.truncate(path, 4096)


CHANGES = (rewrite, replace_file, truncate)


@pytest.fixture
def aged(quick: TinyRun) -> dict[Path, bytes]:
    """The source's shards and their contents, as old as files usually are."""
    shards = {path: path.read_bytes() for path in sorted(quick.source.glob("*.safetensors"))}
    put_back(shards)
    return shards


def put_back(shards: dict[Path, bytes]) -> None:
    for path, data in shards.items():
        path.write_bytes(data)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))


def assert_refused(run: TinyRun, fs: RecordingFileSystem, message: str) -> None:
    """Check that the run ends with exit code 3 and leaves neither staging nor output."""
    with pytest.raises(SourceError, match=message) as caught:
        run.run(fs)
    assert caught.value.exit_code == 3
    assert os.listdir(run.source.parent) == ["src"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shard", [0, 1])
def test_a17_between_two_shards(
    quick: TinyRun, aged: dict[Path, bytes], change: Callable[[Path], None], shard: int
) -> None:
    path = list(aged)[shard]

    def second(step: Step) -> bool:
        return is_new_shard(step) and "-00002-of" in step.subject

    fs = HookedFileSystem(second, partial(change, path))
    # where a copy meets the end of a file, the tensor is named instead.
    assert_refused(quick, fs, f"^({path.name}|tensor '.+'): source changed while reading")
    assert not [s for s in fs.steps if s.subject.endswith(MANIFEST_FILE)]


def test_a16_a17_at_every_step(quick: TinyRun, recorded: Recorded, aged: dict[Path, bytes]) -> None:
    checked = recorded.first("create", MANIFEST_FILE)
    home = quick.destination.parent
    changes = [partial(change, path) for change in CHANGES for path in aged]
    for at, step in enumerate(recorded.steps):
        fs = HookedFileSystem(step, changes[at % len(changes)])
        if at < checked:
            assert_refused(quick, fs, "source changed while reading")
        else:
            # everything had been read, and found unchanged.
            quick.run(fs)
            assert tree_digest(home) == recorded.tree, step
            shutil.rmtree(home)
        put_back(aged)
