"""The index of a sharded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.index import read_index
from adaconvert.testing.faults import write_index


def test_a_good_index_is_read(tmp_path: Path) -> None:
    path = write_index(tmp_path, {"b": "y.safetensors", "a": "sub/x.safetensors"}, 12)
    index = read_index(path)
    assert index.weight_map == {"b": "y.safetensors", "a": "sub/x.safetensors"}
    assert index.total_size == 12
    assert index.files == ("sub/x.safetensors", "y.safetensors")


@pytest.mark.parametrize(
    ("metadata", "total_size"),
    [
        ({}, None),
        ({"total_size": 12.0}, 12),
        ({"total_size": 12.5}, None),
        ({"total_size": "12"}, None),
        ({"total_size": True}, None),
        ([1], None),
        (None, None),
    ],
)
def test_a_strange_total_size_is_no_reason_to_refuse(
    tmp_path: Path, metadata: object, total_size: int | None
) -> None:
    path = tmp_path / "i.json"
    path.write_text(json.dumps({"metadata": metadata, "weight_map": {"a": "x.safetensors"}}))
    assert read_index(path).total_size == total_size


def test_tensor_names_are_checked(tmp_path: Path) -> None:
    path = write_index(tmp_path, {"a\x1b[2J": "x.safetensors"})
    with pytest.raises(SourceError, match=r"index\.json: tensor name 'a\\x1b\[2J' holds control"):
        read_index(path)
