"""io.digest: one pass over a tensor gives its hash and what is not finite in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from adaconvert.dtypes import numpy_dtype
from adaconvert.errors import SourceError
from adaconvert.io import digest as digest_module
from adaconvert.io.digest import (
    BLOCK,
    DigestPool,
    TensorDigest,
    digest_of_digests,
    digest_tensor,
    hash_tensors,
)
from adaconvert.io.source import Source
from adaconvert.planning.ops import Piece
from adaconvert.testing.writing import safetensors_bytes

#: bits of NaN, a NaN with a payload, +infinity and -infinity.
BAD = {
    "F64": [0x7FF8000000000000, 0xFFF0000000000001, 0x7FF0000000000000, 0xFFF0000000000000],
    "F32": [0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000],
    "F16": [0x7E00, 0xFC01, 0x7C00, 0xFC00],
    "BF16": [0x7FC0, 0xFF81, 0x7F80, 0xFF80],
}
#: bits of zero, -0.0, the smallest denormal, the largest denormal and both largest numbers.
GOOD = {
    "F64": [0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF],
    "F32": [0, 1 << 31, 1, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF],
    "F16": [0, 1 << 15, 1, 0x03FF, 0x7BFF, 0xFBFF],
    "BF16": [0, 1 << 15, 1, 0x007F, 0x7F7F, 0xFF7F],
}
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def opened(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> Source:
    """Return a checkpoint of one shard with these tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(dict(tensors)))
    return Source.open(folder)


def stored(dtype: str, bits: list[int]) -> tuple[str, tuple[int, ...], bytes]:
    values = np.array(bits, dtype=f"<u{WIDTH[dtype]}")
    return dtype, (len(bits),), values.tobytes()


@pytest.mark.parametrize("dtype", list(BAD))
def test_d6_every_finite_value_is_finite(tmp_path: Path, dtype: str) -> None:
    source = opened(tmp_path / "src", {"t": stored(dtype, GOOD[dtype] * 10)})
    found = digest_tensor(source, source.tensors["t"])
    raw = stored(dtype, GOOD[dtype] * 10)[2]
    assert found == TensorDigest(sha256=hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize("dtype", list(BAD))
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("at", [0, 17, 63])
def test_d1_one_bad_value(tmp_path: Path, dtype: str, which: int, at: int) -> None:
    bits = (GOOD[dtype] * 11)[:64]
    bits[at] = BAD[dtype][which]
    source = opened(tmp_path / "src", {"t": stored(dtype, bits)})
    found = digest_tensor(source, source.tensors["t"])
    assert (found.finite, found.first_bad, found.bad_count) == (False, at, 1)


@pytest.mark.parametrize("dtype", list(BAD))
def test_d1_counts_across_blocks(tmp_path: Path, dtype: str) -> None:
    count = 2 * BLOCK // WIDTH[dtype] + 100
    values = np.zeros(count, dtype=f"<u{WIDTH[dtype]}")
    bad = [BLOCK // WIDTH[dtype] - 1, BLOCK // WIDTH[dtype], count - 1]
    values[bad] = BAD[dtype][2]
    source = opened(tmp_path / "src", {"t": (dtype, (count,), values.tobytes())})
    found = digest_tensor(source, source.tensors["t"])
    assert (found.first_bad, found.bad_count) == (bad[0], 3)
    assert found.sha256 == hashlib.sha256(values.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", list(BAD))
def test_scan_agrees_with_numpy(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 16, 4096, dtype=np.uint64).astype(np.uint16)
    raw = values.view(f"<u{WIDTH[dtype]}")
    scan = digest_module._Scan(dtype)
    scan.update(memoryview(raw.tobytes()))
    if dtype == "BF16":
        floats = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        floats = raw.view(numpy_dtype(dtype))
    bad = np.flatnonzero(~np.isfinite(floats))
    assert scan.count == len(bad)
    assert scan.first == (int(bad[0]) if len(bad) else None)


def test_integers_are_always_finite(tmp_path: Path) -> None:
    source = opened(tmp_path / "src", {"t": ("I64", (3,), b"\xff" * 24)})
    assert digest_tensor(source, source.tensors["t"]).finite


def test_empty_tensor(tmp_path: Path) -> None:
    source = opened(tmp_path / "src", {"t": ("F32", (0, 4), b""), "u": ("F32", (1,), bytes(4))})
    assert digest_tensor(source, source.tensors["t"]).sha256 == hashlib.sha256(b"").hexdigest()


def three_bad(folder: Path) -> Source:
    bits = [0] * 40
    for at in (17, 20, 39):
        bits[at] = BAD["BF16"][0]
    return opened(folder, {"a": stored("F32", [0, 1]), "x": stored("BF16", bits)})


def test_d1_message(tmp_path: Path) -> None:
    source = three_bad(tmp_path / "src")
    message = (
        "model.safetensors: tensor 'x' holds 3 non-finite values, first at flat index 17. "
        "Repair the source, or pass --allow-nonfinite to convert it as it is."
    )
    with DigestPool([source]) as pool:
        assert pool.tensor(0, "a").finite
        for ask in (
            lambda: pool.tensor(0, "x"),
            lambda: pool.digest_ranges([Piece(source=0, tensor="x", start=0, nbytes=80)]),
            lambda: pool.digest_ranges([Piece(source=0, tensor="x", start=0, nbytes=8)]),
            lambda: pool.source_digest(0),
        ):
            with pytest.raises(SourceError, match=f"^{re.escape(message)}$") as caught:
                ask()
            assert caught.value.exit_code == 3


def test_d1_allowed(tmp_path: Path) -> None:
    source = three_bad(tmp_path / "src")
    with DigestPool([source], allow_nonfinite=True) as pool:
        assert pool.tensor(0, "x").bad_count == 3
        pool.source_digest(0)
        assert {key: d.bad_count for key, d in pool.nonfinite().items()} == {(0, "x"): 3}


def test_every_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(tmp_path / "src", {n: stored("F32", [ord(n)] * 8) for n in "abc"})
    read: list[str] = []
    real = digest_module.digest_tensor

    def watched(opened: Source, ref: object) -> TensorDigest:
        read.append(ref.name)  # type: ignore[attr-defined]
        return real(opened, ref)  # type: ignore[arg-type]

    monkeypatch.setattr(digest_module, "digest_tensor", watched)
    with DigestPool([source], threads=2) as pool:
        pool.prefetch([(0, "b"), (0, "a"), (0, "b")])
        for _ in range(3):
            pool.tensor(0, "a")
            pool.digest_ranges([Piece(source=0, tensor="b", start=0, nbytes=32)])
            pool.digest_ranges([Piece(source=0, tensor="b", start=0, nbytes=4, stride=4, count=8)])
        pool.source_digest(0)
    assert sorted(read) == ["a", "b", "c"]


def test_ranges(tmp_path: Path) -> None:
    raw = {n: np.arange(64, dtype=np.float32).tobytes()[::1] for n in "ab"}
    source = opened(tmp_path / "src", {n: ("F32", (8, 8), data) for n, data in raw.items()})
    pieces = [
        Piece(source=0, tensor="b", start=128, nbytes=64),
        Piece(source=0, tensor="a", start=4, nbytes=12, stride=32, count=8),
    ]
    rows = np.frombuffer(raw["a"], np.float32).reshape(8, 8)[:, 1:4]
    wanted = hashlib.sha256(raw["b"][128:192] + rows.tobytes()).hexdigest()
    with DigestPool([source]) as pool:
        pool.prefetch_ranges(pieces)
        assert pool.digest_ranges(pieces) == pool.digest_ranges(iter(pieces)) == wanted


def test_several_sources(tmp_path: Path) -> None:
    sources = [opened(tmp_path / n, {"t": stored("F32", [ord(n)])}) for n in "ab"]
    with DigestPool(sources) as pool:
        assert pool.tensor(0, "t") != pool.tensor(1, "t")
        assert pool.source_digest(0) != pool.source_digest(1)
        swapped = [
            Piece(source=1, tensor="t", start=0, nbytes=4),
            Piece(source=0, tensor="t", start=0, nbytes=4),
        ]
        wanted = b"b\0\0\0a\0\0\0"
        assert pool.digest_ranges(swapped) == hashlib.sha256(wanted).hexdigest()


def test_source_digest_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    a, b = stored("F32", [1]), stored("F32", [2])
    shapes = [{"x": a, "y": b}, {"y": b, "x": a}, {"x": b, "y": a}, {"x": a, "z": b}]
    found = []
    for index, tensors in enumerate(shapes):
        with DigestPool([opened(tmp_path / str(index), tensors)]) as pool:
            found.append(pool.source_digest(0))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert digest_of_digests({"b": "00", "a": "11"}) == digest_of_digests({"a": "11", "b": "00"})


@pytest.mark.parametrize("change", ["cut", "replaced", "removed"])
def test_a16_a17_source_changed(tmp_path: Path, change: str) -> None:
    source = opened(tmp_path / "src", {"t": stored("F32", [0] * 64)})
    file = tmp_path / "src" / "model.safetensors"
    raw = file.read_bytes()
    if change == "cut":
        file.write_bytes(raw[:-8])
    else:
        file.rename(tmp_path / "elsewhere")
    if change == "replaced":
        file.write_bytes(raw)
    with DigestPool([source]) as pool:
        for ask in (
            lambda: pool.tensor(0, "t"),
            lambda: pool.digest_ranges([Piece(source=0, tensor="t", start=8, nbytes=8)]),
        ):
            with pytest.raises(SourceError, match=r"model\.safetensors: "):
                ask()


def test_hash_tensors_of_a_short_file(tmp_path: Path) -> None:
    source = opened(tmp_path / "src", {"t": stored("F32", [0] * 64)})
    with (
        (tmp_path / "src" / "config.json").open("rb") as file,
        pytest.raises(SourceError, match=r"x\.json: source changed while reading"),
    ):
        hash_tensors(file.fileno(), list(source.tensors.values()), where="x.json")


def test_close_drops_what_is_queued(tmp_path: Path) -> None:
    tensors = {f"t{i}": stored("F32", [i]) for i in range(200)}
    source = opened(tmp_path / "src", tensors)
    pool = DigestPool([source])
    pool.prefetch((0, name) for name in tensors)
    pool.close()
    assert len(pool.nonfinite()) == 0
