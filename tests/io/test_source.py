"""Opening good checkpoints: what a `Source` says about them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    DENSE_CONFIG,
    dense_tensors,
    tree_state,
    write_config,
    write_dense,
    write_sharded,
)


def test_a_single_file_checkpoint_opens(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense")
    (folder / "tokenizer.json").write_text("{}")
    before = tree_state(folder)
    source = Source.open(folder)
    assert source.root == folder
    assert (source.label, source.revision) == ("dense", None)
    assert source.files == ("model.safetensors",)
    assert source.config == DENSE_CONFIG
    assert source.side_files == ("tokenizer.json",)
    assert source.notes == ()
    assert list(source.tensors) == list(dense_tensors())
    assert source.path("tokenizer.json").read_text() == "{}"
    source.assert_unchanged()
    assert tree_state(folder) == before


def test_shards_hold_the_same_tensors_as_the_single_file(tmp_path: Path) -> None:
    single = Source.open(write_dense(tmp_path / "a"))
    sharded = Source.open(write_sharded(tmp_path / "b", 3))
    assert len(sharded.files) == 3
    assert sharded.notes == ()
    assert sharded.side_files == ()
    assert {name: (ref.dtype, ref.shape) for name, ref in single.tensors.items()} == {
        name: (ref.dtype, ref.shape) for name, ref in sharded.tensors.items()
    }
    order = [(ref.file, ref.start) for ref in sharded.tensors.values()]
    assert order == sorted(order)


def test_where_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dense(tmp_path / "dense")
    monkeypatch.chdir(folder)
    assert Source.open(".").label == "dense"
    monkeypatch.chdir(tmp_path)
    source = Source.open("dense")
    monkeypatch.chdir("/")
    source.assert_unchanged()


def test_the_fingerprint_covers_config_and_headers_but_no_weights(tmp_path: Path) -> None:
    first = Source.open(write_dense(tmp_path / "a")).fingerprint
    assert len(first) == 64
    assert Source.open(write_dense(tmp_path / "b")).fingerprint == first
    assert Source.open(write_sharded(tmp_path / "c")).fingerprint != first
    assert Source.open(write_dense(tmp_path / "d", rope_theta=5.0)).fingerprint != first
    weights = tmp_path / "b" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert Source.open(tmp_path / "b").fingerprint == first


def test_key_order_of_the_config_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "a")
    first = Source.open(folder).fingerprint
    reordered = dict(reversed(DENSE_CONFIG.items()))
    (folder / "config.json").write_text(json.dumps(reordered))
    assert Source.open(folder).fingerprint == first


def test_integer_and_bool_buffers_are_left_to_the_architecture(tmp_path: Path) -> None:
    from adaconvert.testing.faults import shard_bytes

    folder = write_dense(tmp_path / "dense")
    tensors = dense_tensors() | {
        "h.0.attn.bias": ("BOOL", (2,), b"\x01\x00"),
        "position_ids": ("I64", (1,), bytes(8)),
    }
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors))
    assert {"h.0.attn.bias", "position_ids"} <= set(Source.open(folder).tensors)


def test_printing_a_source_shows_nothing_from_its_files(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense", hf_token="hf_CANARYCANARYCANARY")
    assert "CANARY" not in repr(Source.open(folder))


@pytest.mark.parametrize("kind", ["rewritten", "touched", "replaced", "removed"])
def test_a_changed_shard_is_noticed(tmp_path: Path, kind: str) -> None:
    folder = write_sharded(tmp_path / "dense", 2)
    source = Source.open(folder)
    shard = folder / source.files[1]
    raw = shard.read_bytes()
    if kind == "rewritten":
        shard.write_bytes(raw + b"x")
    elif kind == "touched":
        os.utime(shard, ns=(0, 0))
    elif kind == "replaced":
        status = shard.stat()
        other = tmp_path / "other"
        other.write_bytes(raw)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(shard)
    else:
        shard.unlink()
    with pytest.raises(
        SourceError, match=r"model-00002-of-00002\.safetensors: source changed while reading; found"
    ):
        source.assert_unchanged()


def test_an_unchanged_config_key_survives_sanitising_in_raw_config(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    write_dense(folder)
    write_config(folder, auto_map={"AutoModel": "x.Y"}, head_dim=4)
    source = Source.open(folder)
    assert "auto_map" in source.raw_config
    assert "auto_map" not in source.config
    assert source.config["head_dim"] == 4
