"""G4, G5, G20: a full or broken disk ends the run with numbers, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.errors import AdaconvertError, ResourceError
from adaconvert.io.commit import already_committed
from adaconvert.testing.writing import (
    FailingFileSystem,
    RecordingFileSystem,
    TinyConversion,
    in_child,
    tiny_source,
    tree_digest,
)

NUMBERS = re.compile(r"expected \S+ \w+ \(\d+ bytes\) free, found \S+ \w+ \(\d+ bytes\) free")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs are synced here."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="adaconvert-") as name:
        yield Path(name)


@pytest.fixture
def conversion(folder: Path) -> TinyConversion:
    return TinyConversion(
        source=tiny_source(folder / "src"),
        destination=folder / "new" / "out",
        needed_bytes=100_000,
    )


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def expected_error(yes: bool) -> AbstractContextManager[object]:
    return pytest.raises(ResourceError, match="no space left") if yes else nullcontext()


def test_g4_disk_full_at_every_step(conversion: TinyConversion) -> None:
    recorded = RecordingFileSystem()
    conversion.run(recorded)
    reference = tree_digest(conversion.destination)
    source = tree_digest(conversion.source)
    rename = next(at for at, s in enumerate(recorded.steps) if s.action == "rename")
    parent = conversion.destination.parent
    for at, step in enumerate(recorded.steps):
        shutil.rmtree(parent, ignore_errors=True)
        before = open_files()
        fs = FailingFileSystem(at)
        if at <= rename:
            with pytest.raises(ResourceError, match="no space left on the disk") as caught:
                conversion.run(fs)
            assert caught.value.exit_code == 6
            assert NUMBERS.search(str(caught.value)), f"step {at} {step}: {caught.value}"
            assert not parent.exists(), f"step {at} {step}"
        else:
            # the output is complete; at most its durability is in doubt.
            with expected_error(step.action == "fsync_dir"):
                conversion.run(fs)
            assert tree_digest(conversion.destination) == reference
            assert already_committed(conversion.destination, plan_digest="1" * 64)
            assert os.listdir(parent) == ["out"]
        assert open_files() == before, f"step {at} {step}"
    assert tree_digest(conversion.source) == source


def test_g4_disk_full_while_replacing(conversion: TinyConversion) -> None:
    target = conversion.destination
    earlier = replace(conversion, plan_digest="0" * 64)
    earlier.run()
    old = tree_digest(target)
    replacing = replace(conversion, overwrite=True)
    recorded = RecordingFileSystem()
    replacing.run(recorded)
    new = tree_digest(target)
    renames = [at for at, s in enumerate(recorded.steps) if s.action == "rename"]
    assert len(renames) == 2
    for at in range(renames[0] - 1, len(recorded.steps)):
        shutil.rmtree(target)
        earlier.run()
        if at <= renames[1]:
            with pytest.raises(ResourceError, match="no space left on the disk"):
                replacing.run(FailingFileSystem(at))
            assert tree_digest(target) == old
            assert os.listdir(target.parent) == ["out"]
        else:
            with expected_error(recorded.steps[at].action == "fsync_dir"):
                replacing.run(FailingFileSystem(at))
            assert tree_digest(target) == new
            # the next run removes what could not be removed.
            assert already_committed(target, plan_digest="1" * 64)
            assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize(
    ("action", "number", "message"),
    [
        ("fsync", errno.EIO, "the disk reports an input/output error. Check the disk"),
        ("fsync_dir", errno.EIO, "the disk reports an input/output error. Check the disk"),
        ("allocate", errno.EDQUOT, "the disk quota is used up; expected .* free, found .* free"),
        ("create", errno.EMFILE, r"too many open files. Raise the limit \(ulimit -n\)"),
        ("mkdir", errno.EROFS, "the file system is read-only"),
        ("write", errno.EPERM, "operation not permitted"),
        ("rename", errno.ESTALE, "new/out: "),
    ],
)
def test_g5_errors_of_one_kind(
    conversion: TinyConversion, action: str, number: int, message: str
) -> None:
    with pytest.raises(ResourceError, match=message) as caught:
        conversion.run(FailingFileSystem(action=action, number=number))
    assert caught.value.exit_code == 6
    assert not conversion.destination.exists()


def test_g5_file_size_limit(conversion: TinyConversion) -> None:
    with (
        limit(resource.RLIMIT_FSIZE, 100_000),
        pytest.raises(ResourceError, match="the file would be larger than the limit") as caught,
    ):
        conversion.run()
    assert caught.value.where == "model-00001-of-00003.safetensors"
    assert not conversion.destination.parent.exists()


def test_g5_not_one_file_more(conversion: TinyConversion) -> None:
    def starve() -> None:
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))
        try:
            conversion.run()
        except AdaconvertError as error:
            os._exit(error.exit_code)

    assert in_child(starve) == 6
    assert not conversion.destination.parent.exists()


def test_g20_too_small_a_disk_is_refused_first(conversion: TinyConversion) -> None:
    fs = RecordingFileSystem()
    message = "the disk is too small for the output; expected .* free, found"
    with pytest.raises(ResourceError, match=message) as caught:
        replace(conversion, needed_bytes=10**18).run(fs)
    assert NUMBERS.search(str(caught.value))
    assert str(10**18) in str(caught.value)
    assert not [step for step in fs.steps if "/checkpoint/" in step.subject]
    assert not conversion.destination.parent.exists()
