"""Group B of the fault catalogue: the set of files. Each test names its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_the_good_checkpoint_of_these_tests_is_good(tmp_path: Path) -> None:
    source = Source.open(write_sharded(tmp_path, 2))
    assert source.notes == ()
    assert source.config == DENSE_CONFIG
