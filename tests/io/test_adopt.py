"""A shard that is taken over from an earlier output: linked where it is replaced, else copied."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.commit import Staging
from adaconvert.io.fs import FileSystem
from adaconvert.io.layout import ShardRecord

DATA = b"weights" * 1000


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "old.safetensors"
    path.write_bytes(DATA)
    return path


def record(nbytes: int = len(DATA)) -> ShardRecord:
    return ShardRecord(file="model.safetensors", nbytes=nbytes, digest="0" * 64, tensors={})


def adopted(
    shard: Path, *, link: bool, fs: FileSystem | None = None, nbytes: int = len(DATA)
) -> int:
    """Return the inode the shard has in the finished output."""
    target = shard.with_name("out")
    with Staging.open(target, sources=[], plan_digest="x", fs=fs) as staging:
        staging.adopt(record(nbytes), shard, link=link)
        assert staging.records() == {"model.safetensors": record()}
        staging.write_file("adaconvert.json", b"{}")
        staging.commit()
    assert (target / "model.safetensors").read_bytes() == DATA
    return os.stat(target / "model.safetensors").st_ino


def test_a_link_is_the_same_file(shard: Path) -> None:
    assert adopted(shard, link=True) == shard.stat().st_ino


def test_a_copy_is_another(shard: Path) -> None:
    assert adopted(shard, link=False) != shard.stat().st_ino


def test_a_symbolic_link_is_followed_and_copied(shard: Path) -> None:
    named = shard.with_name("named")
    named.symlink_to(shard)
    inode = adopted(named, link=True)
    assert inode not in {shard.stat().st_ino, named.lstat().st_ino}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_link_gets_a_copy(
    shard: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert adopted(shard, link=True) != shard.stat().st_ino


def test_a_broken_disk_is_an_error(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(ResourceError, match="the disk reports an input/output error"):
        adopted(shard, link=True)
    assert [path.name for path in shard.parent.iterdir()] == ["old.safetensors"]


def test_a_shard_of_another_size_is_refused(shard: Path) -> None:
    message = r"model\.safetensors: is not the shard adaconvert\.json lists; expected 7001 bytes, "
    with pytest.raises(SourceError, match=message + "found 7000 bytes"):
        adopted(shard, link=True, nbytes=7001)
    with pytest.raises(SourceError, match="is missing"):
        adopted(shard.with_name("none"), link=True)
