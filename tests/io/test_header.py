"""Headers of good files; for bad ones see tests/faults/test_a_one_file.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adaconvert.io.header import read_header, read_shard_header
from adaconvert.testing.faults import craft, entry, floats, shard_bytes


def test_refs_tell_where_the_bytes_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(shard_bytes({"b": floats(2, 3), "a": floats(4, first=9)}))
    tensors, metadata = read_header(path, "sub/m.safetensors")
    assert metadata == {"format": "pt"}
    assert list(tensors) == ["b", "a"]
    ref = tensors["a"]
    assert (ref.name, ref.dtype, ref.shape, ref.file) == ("a", "F32", (4,), "sub/m.safetensors")
    data = path.read_bytes()[ref.start : ref.start + ref.nbytes]
    assert data == floats(4, first=9)[2]


def test_files_of_the_reference_writer_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    arrays = {"x": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.array([[True]])}
    save_file(arrays, path)
    tensors, metadata = read_header(path, path.name)
    assert metadata == {}
    assert {name: (ref.dtype, ref.shape) for name, ref in tensors.items()} == {
        "x": ("F16", (2, 3)),
        "n": ("BOOL", (1, 1)),
    }
    raw = path.read_bytes()
    assert tensors["x"].start + 12 <= len(raw)
    assert raw[tensors["x"].start :][:12] == arrays["x"].tobytes()


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2), ("I64", 8), ("U8", 1), ("BOOL", 1)],
)
def test_plain_dtypes_are_read(tmp_path: Path, dtype: str, width: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(craft({"x": entry(dtype, [3], 0, 3 * width)}, bytes(3 * width)))
    assert read_header(path, path.name)[0]["x"].nbytes == 3 * width


def test_identity_of_the_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(shard_bytes({"a": floats(1)}))
    header, status = read_shard_header(path, path.name), path.stat()
    assert (header.size, header.inode) == (status.st_size, status.st_ino)
    assert header.mtime_ns == status.st_mtime_ns
    path.write_bytes(shard_bytes({"a": floats(1, first=1)}))
    assert read_shard_header(path, path.name).sha256 == header.sha256
    path.write_bytes(shard_bytes({"b": floats(1)}))
    assert read_shard_header(path, path.name).sha256 != header.sha256


def test_reading_headers_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, adaconvert.io.source, adaconvert.io.reader\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub', 'transformers'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
