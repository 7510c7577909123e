"""G4, G5, G20: a full or broken disk ends the run with numbers, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.errors import AdaconvertError, ResourceError
from adaconvert.testing.faults import tree_state
from adaconvert.testing.writing import (
    FailingFileSystem,
    Recorded,
    RecordingFileSystem,
    Step,
    TinyRun,
    in_child,
    sparse_source,
    tree_digest,
)

NUMBERS = re.compile(r"expected \S+ \w+ \(\d+ bytes\) free, found \S+ \w+ \(\d+ bytes\) free")
FULL = "no space left on the disk"


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


def test_g4_disk_full_at_every_step(quick: TinyRun, recorded: Recorded) -> None:
    source = tree_state(quick.source)
    home = quick.destination.parent
    rename = recorded.first("rename")
    before = open_files()
    for at, step in enumerate(recorded.steps):
        fails = at <= rename or step.action == "fsync_dir"
        with pytest.raises(ResourceError, match=FULL) if fails else nullcontext() as caught:
            quick.run(FailingFileSystem(step))
        if caught is not None:
            assert caught.value.exit_code == 6
            assert NUMBERS.search(str(caught.value)), f"{step}: {caught.value}"
        if at <= rename:
            assert not home.exists(), step
        else:
            # the output is complete, at most its durability is in doubt; what could not be removed
            # goes when the run is resumed.
            assert tree_digest(quick.destination) == {
                name[4:]: digest for name, digest in recorded.tree.items() if name != "out"
            }
            replace(quick, resume=True).run()
            assert tree_digest(home) == recorded.tree, step
            shutil.rmtree(home)
        assert open_files() == before, step
    assert tree_state(quick.source) == source


def test_g4_disk_full_while_replacing(quick: TinyRun, recorded: Recorded, memory: Path) -> None:
    home = quick.destination.parent
    replace(quick, seed=1).run()
    shutil.copytree(home, memory / "earlier")
    old = tree_digest(home)
    replacing = replace(quick, overwrite=True)
    fs = RecordingFileSystem()
    replacing.run(fs)
    swap, last = [at for at, s in enumerate(fs.steps) if s.action == "rename"]
    for at, step in enumerate(fs.steps[swap - 1 :], start=swap - 1):
        shutil.rmtree(home)
        shutil.copytree(memory / "earlier", home)
        fails = at <= last or step.action == "fsync_dir"
        with pytest.raises(ResourceError, match=FULL) if fails else nullcontext():
            replacing.run(FailingFileSystem(step))
        if at <= last:
            assert tree_digest(home) == old, step
        else:
            replace(replacing, resume=True).run()
            assert tree_digest(home) == recorded.tree, step


@pytest.mark.parametrize(
    ("action", "number", "message"),
    [
        ("fsync", errno.EIO, "the disk reports an input/output error. Check the disk"),
        ("fsync_dir", errno.EIO, "the disk reports an input/output error. Check the disk"),
        ("allocate", errno.EDQUOT, "the disk quota is used up; expected .* free, found .* free"),
        ("allocate", errno.EFBIG, "the file would be larger than the limit for one file"),
        ("create", errno.EMFILE, r"too many open files. Raise the limit \(ulimit -n\)"),
        ("mkdir", errno.EROFS, "the file system is read-only"),
        ("write", errno.EPERM, "operation not permitted"),
        ("rename", errno.ESTALE, "new/out: "),
    ],
)
def test_g5_one_error_or_many(
    quick: TinyRun, recorded: Recorded, action: str, number: int, message: str
) -> None:
    rename = recorded.first("rename")
    once = [step for step in recorded.steps[: rename + 1] if step.action == action]
    assert once
    disks: list[Step | str] = [*once, action]
    for at in disks:
        with pytest.raises(ResourceError, match=message) as caught:
            quick.run(FailingFileSystem(at, number))
        assert caught.value.exit_code == 6
        assert not quick.destination.parent.exists(), at


def test_g5_file_size_limit(quick: TinyRun) -> None:
    with (
        limit(resource.RLIMIT_FSIZE, 60_000),
        pytest.raises(ResourceError, match="the file would be larger than the limit") as caught,
    ):
        quick.run()
    assert caught.value.where == "model-00001-of-00003.safetensors"
    assert not quick.destination.parent.exists()


def test_g5_not_one_file_more(quick: TinyRun, recorded: Recorded) -> None:
    def starve(spare: int) -> None:
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, free + spare))
        try:
            quick.run()
        except AdaconvertError as error:
            os._exit(error.exit_code)

    codes = []
    for spare in range(1, 40):
        codes.append(in_child(lambda spare=spare: starve(spare)))  # type: ignore[misc]
        assert quick.destination.parent.exists() is (codes[-1] == 0), spare
        if codes[-1] == 0:
            break
    # from the first file that cannot be opened to the last, and then it works.
    assert codes == [*[6] * (len(codes) - 1), 0]
    assert len(codes) > 3
    assert tree_digest(quick.destination.parent) == recorded.tree


def test_g20_too_small_a_disk_is_refused_first(quick: TinyRun, memory: Path) -> None:
    # 256 experts of 0.8 TB each.
    sparse = sparse_source(memory / "sparse", hidden=1 << 16, inner=1 << 20)
    fs = RecordingFileSystem()
    message = "the disk is too small for the output; expected .* free, found .* free"
    with pytest.raises(ResourceError, match=message) as caught:
        replace(quick, source=sparse, experts=256).run(fs)
    assert caught.value.exit_code == 6
    assert NUMBERS.search(str(caught.value))
    assert not [step for step in fs.steps if "/checkpoint/" in step.subject]
    assert not quick.destination.parent.exists()
