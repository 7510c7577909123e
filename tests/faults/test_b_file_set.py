"""Group B of the fault catalogue: the set of files. Each test names its row."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.reader import read_bytes
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    DENSE_CONFIG,
    dense_tensors,
    floats,
    refusal,
    shard_bytes,
    shard_name,
    write_config,
    write_dense,
    write_index,
    write_sharded,
)
from adaconvert.testing.hub_cache import COMMIT, build_hub_cache

INDEX = "model.safetensors.index.json"


def pair(folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint in two shards and return the paths of both."""
    write_sharded(folder, 2)
    return folder / shard_name(1, 2), folder / shard_name(2, 2)


def map_of(folder: Path) -> dict[str, object]:
    """Return the weight map of a good index."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert isinstance(weight_map, dict)
    return weight_map


def test_b1_one_shard_missing(tmp_path: Path) -> None:
    first, _ = pair(tmp_path)
    first.unlink()
    assert refusal(tmp_path) == (
        f"{INDEX}: 1 shard is missing: {first.name}. Fetch the checkpoint again."
    )


def test_b1_all_missing_shards_are_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, 5)
    for number in (1, 3, 4):
        (tmp_path / shard_name(number, 5)).unlink()
    names = ", ".join(shard_name(number, 5) for number in (1, 3, 4))
    assert f"3 shards are missing: {names}." in refusal(tmp_path)


def test_b2_index_lists_what_the_shard_lacks(tmp_path: Path) -> None:
    first, _ = pair(tmp_path)
    write_index(tmp_path, map_of(tmp_path) | {"ghost": first.name})
    assert f"{first.name}: index lists tensor 'ghost', which the shard does not hold" in refusal(
        tmp_path
    )


def test_b2_the_tensor_is_in_another_shard(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    write_index(tmp_path, map_of(tmp_path) | {"lm_head.weight": first.name})
    message = refusal(tmp_path)
    assert f"{first.name}: index lists tensor 'lm_head.weight'" in message
    assert f"found it in {second.name}" in message


def test_b3_shard_holds_what_the_index_lacks(tmp_path: Path) -> None:
    _, second = pair(tmp_path)
    weight_map = map_of(tmp_path)
    del weight_map["lm_head.weight"]
    write_index(tmp_path, weight_map)
    assert refusal(tmp_path) == (
        f"{second.name}: holds tensor 'lm_head.weight', which the index lacks. "
        "Pass --ignore-unindexed to leave them out."
    )
    del weight_map["model.norm.weight"]
    write_index(tmp_path, weight_map)
    assert f"{second.name}: holds 2 tensors the index lacks, such as" in refusal(tmp_path)


def test_b3_unindexed_tensors_are_left_out_on_request(tmp_path: Path) -> None:
    pair(tmp_path)
    weight_map = map_of(tmp_path)
    del weight_map["lm_head.weight"]
    write_index(tmp_path, weight_map)
    source = Source.open(tmp_path, ignore_unindexed=True)
    assert set(source.tensors) == set(weight_map)
    assert source.unindexed == ("lm_head.weight",)
    assert "left out tensors the index lacks: lm_head.weight" in source.notes


@pytest.mark.parametrize("ignore", [False, True])
def test_b4_one_tensor_in_two_shards(tmp_path: Path, ignore: bool) -> None:
    first, second = pair(tmp_path)
    second.write_bytes(
        shard_bytes(
            {
                name: t
                for name, t in dense_tensors().items()
                if map_of(tmp_path)[name] == second.name
            }
            | {"model.embed_tokens.weight": floats(16, 8, first=7)}
        )
    )
    message = refusal(tmp_path, ignore_unindexed=ignore)
    assert f"{second.name}: tensor 'model.embed_tokens.weight' is also in {first.name}" in message


def test_b5_index_without_metadata(tmp_path: Path) -> None:
    pair(tmp_path)
    write_index(tmp_path, map_of(tmp_path))
    source = Source.open(tmp_path)
    assert source.notes == ()
    assert len(source.tensors) == len(dense_tensors())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metadata": {}}', "weight_map is no object; expected an object, found none"),
        ('{"weight_map": []}', "weight_map is no object; expected an object, found an array"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ("[]", "is not a JSON object; expected an object, found an array"),
        ('{"weight_map": {"a": 1}}', "tensor 'a': shard is not a string; found a number"),
        ('{"weight_map": {"a": null}}', "tensor 'a': shard is not a string; found null"),
        ('{"weight_map": {"a": ["x"]}}', "tensor 'a': shard is not a string; found an array"),
    ],
)
def test_b6_shape_of_the_index(tmp_path: Path, text: str, message: str) -> None:
    write_config(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert refusal(tmp_path) == f"{INDEX}: {message}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"weight_map": {', "is not valid JSON"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "duplicate key 'a'"),
        (b'{"weight_map": {}, "weight_map": {}}', "duplicate key 'weight_map'"),
        (b'{"metadata": {"total_size": NaN}}', "is not valid JSON; found the number NaN"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b"\x00\x01\xff", "is not UTF-8 text"),
    ],
)
def test_b7_index_that_is_no_json(tmp_path: Path, raw: bytes, message: str) -> None:
    write_config(tmp_path)
    (tmp_path / INDEX).write_bytes(raw)
    assert refusal(tmp_path).startswith(f"{INDEX}: {message}")


def test_b7_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    pair(tmp_path)
    index = tmp_path / INDEX
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert len(Source.open(tmp_path).tensors) == len(dense_tensors())


@pytest.mark.timeout(10)
def test_b7_a_gigabyte_of_index_is_not_read(tmp_path: Path) -> None:
    write_config(tmp_path)
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 30)
    assert refusal(tmp_path) == (
        f"{INDEX}: is too large to be read; expected at most 64000000 bytes, found {1 << 30}"
    )


@pytest.mark.parametrize(
    "path",
    [
        "../x.safetensors",
        "/x.safetensors",
        "C:x.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "..\\x.safetensors",
        "a/../../x.safetensors",
        "./x.safetensors",
        "",
        ".",
        "..",
        "x\x00.safetensors",
        "x\n.safetensors",
        "file:///x.safetensors",
        "nul.safetensors",
        "~/../x.safetensors",
    ],
)
def test_b8_paths_that_leave_the_folder(tmp_path: Path, path: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    # the file is there: only the name is wrong
    (tmp_path / "x.safetensors").write_bytes(shard_bytes({"a": floats(1)}))
    write_config(inner)
    write_index(inner, {"a": path})
    assert refusal(inner).startswith(f"{INDEX}: tensor 'a': file name '")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "x.safetensors.bin", "x.SAFETENSORS", "x"])
def test_b9_index_that_leads_to_a_pickle(tmp_path: Path, file: str) -> None:
    write_config(tmp_path)
    write_index(tmp_path, {"a": file})
    (tmp_path / file).write_bytes(b"\x80\x02.")
    assert f"{INDEX}: tensor 'a': shard '{file}' is no safetensors file" in refusal(tmp_path)


def test_b10_shards_in_a_folder_inside(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.safetensors").write_bytes(shard_bytes({"a": floats(2)}))
    write_index(tmp_path, {"a": "sub/x.safetensors"})
    source = Source.open(tmp_path)
    assert source.files == ("sub/x.safetensors",)
    assert read_bytes(source, source.tensors["a"]) == floats(2)[2]
    assert source.notes == ()


@pytest.mark.parametrize("inside", ["", "sub/"])
def test_b11_names_that_differ_in_case(tmp_path: Path, inside: str) -> None:
    write_config(tmp_path)
    (tmp_path / "sub").mkdir()
    name = f"{inside}MODEL-00001-of-00001.safetensors"
    (tmp_path / name).write_bytes(shard_bytes({"a": floats(2)}))
    write_index(tmp_path, {"a": name.lower()})
    if (tmp_path / name.lower()).exists():
        assert Source.open(tmp_path).files
        return
    assert refusal(tmp_path) == (
        f"{INDEX}: shard name differs in case only; found {name}, "
        f"index says {name.lower()}. Rename the file as the index says."
    )


def test_b12_single_file_and_index_that_agree(tmp_path: Path) -> None:
    write_sharded(tmp_path, 2)
    write_dense(tmp_path)
    source = Source.open(tmp_path)
    assert source.files == ("model.safetensors",)
    assert source.notes[0] == (
        f"model.safetensors is used; {INDEX} names the same tensors and is ignored"
    )
    assert shard_name(1, 2) in source.notes[1]


def test_b12_single_file_and_index_that_disagree(tmp_path: Path) -> None:
    write_sharded(tmp_path, 2)
    write_dense(tmp_path)
    write_index(tmp_path, {"ghost": shard_name(1, 2)})
    message = refusal(tmp_path)
    assert message.startswith(
        f"model.safetensors: disagrees with {INDEX} about the tensors; found 22 tensors in one "
        f"only, such as 'ghost' in {INDEX}"
    )


def test_b12_single_file_with_an_index_of_its_own(tmp_path: Path) -> None:
    write_dense(tmp_path)
    write_index(tmp_path, dict.fromkeys(dense_tensors(), "model.safetensors"))
    source = Source.open(tmp_path)
    assert (source.files, source.notes) == (("model.safetensors",), ())


def test_b13_a_second_set_of_shards_left_over(tmp_path: Path) -> None:
    write_sharded(tmp_path, 3)
    write_sharded(tmp_path, 2)
    source = Source.open(tmp_path)
    assert source.files == (shard_name(1, 2), shard_name(2, 2))
    left = ", ".join(shard_name(number, 3) for number in (1, 2, 3))
    assert source.notes == (f"ignored safetensors files that are no part of the model: {left}",)


def test_b14_index_of_another_sharding(tmp_path: Path) -> None:
    write_sharded(tmp_path, 3)
    index = (tmp_path / INDEX).read_text()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    write_sharded(tmp_path, 2)
    (tmp_path / INDEX).write_text(index)
    message = refusal(tmp_path)
    assert f"{INDEX}: 3 shards are missing: {shard_name(1, 3)}" in message
    assert "holds a complete set of 2 shards named model-...-of-00002" in message
    assert "the names look re-sharded" in message


def test_b15_wrong_total_size(tmp_path: Path) -> None:
    pair(tmp_path)
    total = sum(len(data) for _, _, data in dense_tensors().values())
    write_index(tmp_path, map_of(tmp_path), total + 1)
    assert Source.open(tmp_path).notes == (
        f"{INDEX}: total_size is {total + 1}, the tensors hold {total} bytes",
    )


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


def test_the_good_checkpoint_of_these_tests_is_good(tmp_path: Path) -> None:
    source = Source.open(write_sharded(tmp_path, 2))
    assert source.notes == ()
    assert source.config == DENSE_CONFIG
