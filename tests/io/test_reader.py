"""Reading weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adaconvert.errors import SourceError
from adaconvert.io.reader import iter_chunks, open_shard, read_bytes, read_numpy, read_torch
from adaconvert.io.source import Source
from adaconvert.testing.faults import Stored, dense_tensors, shard_bytes, write_dense


def _source(folder: Path, **tensors: Stored) -> Source:
    write_dense(folder)
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors or dense_tensors()))
    return Source.open(folder)


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = _source(tmp_path)
    for name, (_, shape, data) in dense_tensors().items():
        ref = source.tensors[name]
        assert read_bytes(source, ref) == data
        assert b"".join(iter_chunks(source, ref, 7)) == data
        array, tensor = read_numpy(source, ref), read_torch(source, ref)
        assert array.shape == shape == tuple(tensor.shape)
        assert array.dtype == np.float32
        assert array.tobytes() == data == tensor.numpy().tobytes()


def test_a_range_of_bytes_is_read(tmp_path: Path) -> None:
    source = _source(tmp_path)
    ref = source.tensors["lm_head.weight"]
    data = dense_tensors()["lm_head.weight"][2]
    assert read_bytes(source, ref, 8, 4) == data[8:12]
    assert read_bytes(source, ref, ref.nbytes - 4) == data[-4:]
    assert read_bytes(source, ref, ref.nbytes) == b""


@pytest.mark.parametrize(("start", "nbytes"), [(-1, 1), (0, -1), (0, 513), (512, 1), (513, None)])
def test_a_range_outside_the_tensor_is_a_bug(
    tmp_path: Path, start: int, nbytes: int | None
) -> None:
    source = _source(tmp_path)
    with pytest.raises(ValueError, match="lies outside the 512 bytes of lm_head"):
        read_bytes(source, source.tensors["lm_head.weight"], start, nbytes)


def test_chunks_are_bounded(tmp_path: Path) -> None:
    source = _source(tmp_path)
    sizes = [len(chunk) for chunk in iter_chunks(source, source.tensors["lm_head.weight"], 100)]
    assert sizes == [100, 100, 100, 100, 100, 12]


def test_dtypes_keep_their_bits(tmp_path: Path) -> None:
    source = _source(
        tmp_path,
        b=("BF16", (2,), b"\x80\x3f\x00\xc0"),
        h=("F16", (2,), b"\x00\x3c\x00\x80"),
        d=("F64", (1,), np.float64(0.1).tobytes()),
        i=("I64", (1,), b"\xff" * 8),
        u=("U8", (1,), b"\xff"),
        t=("BOOL", (2,), b"\x01\x00"),
        s=("F32", (), np.float32(2.5).tobytes()),
        z=("F32", (0, 3), b""),
    )
    arrays = {name: read_numpy(source, ref) for name, ref in source.tensors.items()}
    assert arrays["b"].tolist() == [0x3F80, 0xC000]
    assert arrays["h"].tobytes() == b"\x00\x3c\x00\x80"
    assert arrays["i"].tolist() == [-1]
    assert arrays["z"].shape == (0, 3)
    tensors = {name: read_torch(source, ref) for name, ref in source.tensors.items()}
    assert torch.equal(tensors["b"], torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert tensors["t"].tolist() == [True, False]
    assert tensors["d"].item() == 0.1
    assert tensors["u"].tolist() == [255]
    assert tensors["s"].shape == ()
    assert tensors["s"].item() == 2.5
    assert tensors["z"].shape == (0, 3)


def test_results_are_writable(tmp_path: Path) -> None:
    source = _source(tmp_path)
    ref = source.tensors["model.norm.weight"]
    read_numpy(source, ref)[0] = 1
    read_torch(source, ref).add_(1)
    source.assert_unchanged()


def test_a_replaced_shard_is_not_read(tmp_path: Path) -> None:
    source = _source(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with (
        pytest.raises(SourceError, match="source changed while reading; found another size"),
        open_shard(source, "model.safetensors"),
    ):
        pass
