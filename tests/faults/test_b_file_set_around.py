"""Group B of the fault catalogue, continued: what lies beside the weights, links, caches, and
folders that hold none. Each test names its row."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.reader import read_bytes
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    dense_tensors,
    refusal,
    shard_name,
    write_config,
    write_dense,
    write_sharded,
)
from adaconvert.testing.hub_cache import COMMIT, build_hub_cache

INDEX = "model.safetensors.index.json"


def pair(folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint in two shards and return the paths of both."""
    write_sharded(folder, 2)
    return folder / shard_name(1, 2), folder / shard_name(2, 2)


def test_b16_pickles_beside_safetensors(tmp_path: Path) -> None:
    write_dense(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    source = Source.open(tmp_path)
    assert source.files == ("model.safetensors",)
    assert source.notes == ("ignored pickled weights beside the safetensors: pytorch_model.bin",)


def test_b17_other_copies_of_the_weights(tmp_path: Path) -> None:
    write_dense(tmp_path)
    for name in ("model.fp16.safetensors", "consolidated.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"not read")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").write_bytes(b"not read")
    (tmp_path / ".cache").mkdir()
    source = Source.open(tmp_path)
    assert source.files == ("model.safetensors",)
    assert source.notes == (
        "ignored safetensors files that are no part of the model: "
        "consolidated.safetensors, model.fp16.safetensors",
        "ignored weights in other formats: model.gguf",
        "ignored folders and special files: original",
    )


def test_b18_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    plain = write_sharded(tmp_path / "plain", 2)
    (plain / "tokenizer.json").write_text("{}")
    snapshot = build_hub_cache(tmp_path / "hub", "org/name", plain)
    assert (snapshot / "config.json").is_symlink()
    source = Source.open(snapshot)
    assert (source.label, source.revision) == ("org/name", COMMIT)
    assert source.fingerprint == Source.open(plain).fingerprint
    assert source.side_files == ("tokenizer.json",)
    assert source.path("tokenizer.json").read_bytes() == b"{}"
    for name, ref in source.tensors.items():
        assert read_bytes(source, ref) == dense_tensors()[name][2]
    source.assert_unchanged()


def test_b18_a_link_to_a_snapshot(tmp_path: Path) -> None:
    snapshot = build_hub_cache(tmp_path / "hub", "org/name", write_dense(tmp_path / "plain"))
    (tmp_path / "link").symlink_to(snapshot)
    source = Source.open(tmp_path / "link")
    assert (source.label, source.revision) == ("org/name", COMMIT)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_b19_dangling_link(tmp_path: Path, file: str) -> None:
    write_dense(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to("../../blobs/gone\x1b")
    assert refusal(tmp_path) == (
        f"{file}: is a dangling symbolic link; found a link to '../../blobs/gone\\x1b'. "
        "Fetch the file again; in a hub cache, its blob is gone."
    )


def test_b19_dangling_link_in_a_set(tmp_path: Path) -> None:
    first, _ = pair(tmp_path)
    first.unlink()
    first.symlink_to("gone")
    assert f"{first.name}: is a dangling symbolic link; found a link to 'gone'" in refusal(tmp_path)


def test_b19_loop_of_links(tmp_path: Path) -> None:
    write_dense(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("b")
    (tmp_path / "b").symlink_to("model.safetensors")
    assert refusal(tmp_path) == (
        "model.safetensors: is a symbolic link that leads back to itself; found a link to 'b'"
    )


def test_b19_dangling_side_files_are_only_noted(tmp_path: Path) -> None:
    write_dense(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to("gone")
    source = Source.open(tmp_path)
    assert source.side_files == ()
    assert source.notes == ("ignored folders and special files: tokenizer.json",)


def test_b20_blobs_nobody_may_write(tmp_path: Path) -> None:
    snapshot = build_hub_cache(tmp_path / "hub", "org/name", write_dense(tmp_path / "plain"))
    folders = [tmp_path / "hub", *(path for path in (tmp_path / "hub").rglob("*") if path.is_dir())]
    for blob in (snapshot.parents[1] / "blobs").iterdir():
        blob.chmod(0o444)
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert len(Source.open(snapshot).tensors) == len(dense_tensors())
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_b20_files_are_only_opened_for_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mode bits do not stop root: look at the flags too
    flags_seen = []
    true_open = os.open

    def watch(path: Path, flags: int) -> int:
        flags_seen.append(flags)
        return true_open(path, flags)

    monkeypatch.setattr(os, "open", watch)
    source = Source.open(write_sharded(tmp_path, 2))
    read_bytes(source, source.tensors["lm_head.weight"])
    assert len(flags_seen) == 5
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    assert not any(flags & writing for flags in flags_seen)


def test_b21_four_ways_to_point_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("x")
    absent = tmp_path / "absent"
    assert refusal(empty) == "empty: the folder is empty"
    assert refusal(tmp_path / "file") == (
        "file: is a file; expected a checkpoint folder or a hub id"
    )
    assert f"{absent}: no such folder. Give an existing folder, or a hub id" in refusal(absent)
    assert refusal("org/absent") == (
        "org/absent: no such folder, and not in the hub cache (offline). "
        "Unset HF_HUB_OFFLINE to download it, or give a folder."
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "the folder holds no weights; expected model.safetensors or"),
        ([shard_name(1, 2), shard_name(2, 2)], f"{INDEX} is missing. Fetch the checkpoint again."),
        (["model.fp16.safetensors"], "model.safetensors is missing; found model.fp16.safetensors"),
        (["blobs", "refs", "snapshots"], "this is a repository folder of the hub cache"),
    ],
)
def test_b21_folders_without_a_checkpoint(tmp_path: Path, names: list[str], message: str) -> None:
    write_config(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("where", ["", "a\x00b", "x" * 5000, "~nobody-of-this-name/x", "a/b/c"])
def test_b21_names_no_system_has(where: str) -> None:
    with pytest.raises(SourceError, match=r": no such folder"):
        Source.open(where)


def test_b21_a_folder_that_may_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dense(tmp_path / "dense")

    def refuse(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ResourceError, match="dense: folder cannot be listed: Permission denied"):
        Source.open(tmp_path / "dense")


def test_names_of_files_are_escaped_in_notes(tmp_path: Path) -> None:
    write_dense(tmp_path)
    (tmp_path / "a\x1b[2J\n.safetensors").write_bytes(b"")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    assert Source.open(tmp_path).notes == (
        "ignored safetensors files that are no part of the model: a\\x1b[2J\\n.safetensors",
        "ignored folders and special files: \\udcff",
    )
    shutil.rmtree(os.fsencode(tmp_path) + b"/\xff")
