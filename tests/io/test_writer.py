"""io.writer and io.layout: every byte has its place before it is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adaconvert.dtypes import BY_NAME, nbytes_of
from adaconvert.errors import OptionError, SourceError
from adaconvert.io import layout as layout_module
from adaconvert.io.commit import Staging
from adaconvert.io.header import read_header
from adaconvert.io.writer import (
    ShardLayout,
    index_json,
    layout_shards,
    parse_size,
    shard_digest,
    shard_digest_of_file,
)
from adaconvert.testing.writing import tiny_source


@dataclass(frozen=True)
class T:
    """A target tensor, as far as a layout cares."""

    name: str
    shape: tuple[int, ...] = (4,)
    dtype: str = "F32"
    group: str = ""


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("10MB", 10_000_000),
        ("10MiB", 10 << 20),
        ("1.5 GB", 1_500_000_000),
        ("0.1kb", 100),
        ("40KB", 40_000),
        ("2TiB", 2 << 40),
        ("1", 1),
        (" 7B ", 7),
        (123, 123),
        ("3g", 3_000_000_000),
        ("3Gi", 3 << 30),
    ],
)
def test_g19_parse_size(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1GB",
        "5XB",
        "1e9",
        "nan",
        "0",
        "0.1",
        "5 G B",
        "1iB",
        "5GB\n5",
        "\u0661GB",
        -5,
        0,
    ],
)
def test_g19_parse_size_refuses(text: str | int) -> None:
    message = "--max-shard-size: is no size in bytes; expected a number with a unit, such as 5GB"
    with pytest.raises(OptionError, match=message):
        parse_size(text)


def names(layouts: tuple[ShardLayout, ...]) -> list[list[str]]:
    return [[tensor.name for tensor in layout.tensors] for layout in layouts]


def test_one_file_has_the_plain_name_and_no_index() -> None:
    for cap in (None, 1000):
        (layout,) = layout_shards([T("a"), T("b")], cap)
        assert layout.file == "model.safetensors"
        assert index_json((layout,)) is None


def test_groups_never_straddle() -> None:
    targets = [T("a"), *(T(f"{e}.{m}", group=f"e{e}") for e in range(3) for m in ("g", "u", "d"))]
    layouts = layout_shards(targets, 5 * 16)
    assert names(layouts) == [
        ["a", "0.g", "0.u", "0.d"],
        ["1.g", "1.u", "1.d"],
        ["2.g", "2.u", "2.d"],
    ]
    assert [layout.file for layout in layouts] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_equal_groups_that_are_apart_are_two_groups() -> None:
    targets = [T("a", group="x"), T("b", group="y"), T("c", group="x")]
    assert names(layout_shards(targets, 32)) == [["a", "b"], ["c"]]


def test_a_tensor_larger_than_the_cap_has_its_own_shard() -> None:
    targets = [T("a"), T("big", (100,)), T("b"), T("c")]
    assert names(layout_shards(targets, 40)) == [["a"], ["big"], ["b", "c"]]


def test_a_group_larger_than_the_cap_is_cut_between_tensors() -> None:
    targets = [T(f"{m}", group="e") for m in "gud"]
    assert names(layout_shards(targets, 32)) == [["g", "u"], ["d"]]
    assert names(layout_shards(targets, 1)) == [["g"], ["u"], ["d"]]


def test_wider_elements_come_first_else_order_is_kept() -> None:
    targets = [T("h", dtype="BF16"), T("a"), T("d", dtype="F64"), T("b"), T("u", (3,), "U8")]
    assert names(layout_shards(targets, None)) == [["d", "a", "b", "h", "u"]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["F64", "F32", "BF16", "U8"]),
            st.lists(st.integers(0, 9), max_size=3),
            st.sampled_from(["", "x", "y"]),
        ),
        min_size=1,
        max_size=12,
    ),
    st.one_of(st.none(), st.integers(1, 5000)),
)
def test_layouts_are_valid(shapes: list[tuple[str, list[int], str]], cap: int | None) -> None:
    targets = [T(f"t{i}", tuple(s), d, g) for i, (d, s, g) in enumerate(shapes)]
    layouts = layout_shards(targets, cap)
    placed = [tensor for layout in layouts for tensor in layout.tensors]
    assert sorted(t.name for t in placed) == sorted(t.name for t in targets)
    for layout in layouts:
        assert int.from_bytes(layout.header[:8], "little") == len(layout.header) - 8
        assert len(layout.header) % 8 == 0
        header = json.loads(layout.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        at = len(layout.header)
        for tensor in layout.tensors:
            assert tensor.start == at
            assert tensor.nbytes == nbytes_of(tensor.dtype, tensor.shape)
            assert tensor.nbytes == 0 or at % BY_NAME[tensor.dtype].nbytes == 0
            begin, end = header[tensor.name]["data_offsets"]
            assert (begin, end) == (
                at - len(layout.header),
                at - len(layout.header) + tensor.nbytes,
            )
            at += tensor.nbytes
        assert layout.nbytes == at
        if cap is not None:
            assert (
                at - len(layout.header) <= cap or len(layout.tensors) == 1 or _one_big(layout, cap)
            )


def _one_big(layout: ShardLayout, cap: int) -> bool:
    # empty tensors may follow a tensor that is larger than the cap by itself.
    return sum(tensor.nbytes > 0 for tensor in layout.tensors) == 1


def test_index_lists_every_tensor() -> None:
    layouts = layout_shards([T("a"), T("b", dtype="BF16"), T("é")], 16)
    raw = index_json(layouts)
    assert raw is not None
    assert raw.isascii()
    assert raw.endswith(b"}\n")
    index = json.loads(raw)
    assert index["metadata"] == {"total_parameters": 12, "total_size": 40}
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00002-of-00003.safetensors",
        "é": "model-00003-of-00003.safetensors",
    }


def test_too_many_tensors_for_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "MAX_HEADER", 200)
    message = "model.safetensors: the shard holds more tensors than .* Lower --max-shard-size"
    with pytest.raises(OptionError, match=message):
        layout_shards([T(f"t{i}") for i in range(5)], None)


def test_two_targets_of_one_name() -> None:
    with pytest.raises(ValueError, match="two targets have the same name"):
        layout_shards([T("a"), T("a")], None)


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    source = tiny_source(tmp_path / "src")
    return Staging.open(tmp_path / "out", sources=[source], plan_digest="1" * 64)


def test_what_is_written_is_what_safetensors_reads(staging: Staging) -> None:
    values: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
        "f": np.arange(12, dtype=np.float32).reshape(3, 4),
        "h": np.arange(5, dtype=np.float16),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(7.5, dtype=np.float64),
    }
    dtypes = {"f": "F32", "h": "F16", "empty": "F32", "scalar": "F64"}
    (layout,) = layout_shards([T(n, v.shape, dtypes[n]) for n, v in values.items()], None)
    with staging:
        with staging.shard(layout) as shard:
            for name, value in reversed(values.items()):
                shard.write(name, value)
            shard.finish()
        record = staging.records()["model.safetensors"]
        path = staging.path / layout.file
        with safe_open(path, "np") as file:
            for name, value in values.items():
                np.testing.assert_array_equal(file.get_tensor(name), value)
        refs, metadata = read_header(path, layout.file)
        assert metadata == {"format": "pt"}
        assert {n: (r.start, r.nbytes) for n, r in refs.items()} == {
            t.name: (t.start, t.nbytes) for t in layout.tensors
        }
        assert path.stat().st_size == layout.nbytes == record.nbytes
        assert shard_digest_of_file(path) == (record.digest, record.tensors)


def test_a_tensor_in_several_parts(staging: Staging) -> None:
    (layout,) = layout_shards([T("a"), T("b")], None)
    with staging:
        with staging.shard(layout) as shard:
            shard.write("a", b"0123456789")
            shard.write("b", b"x" * 16)
            shard.write("a", memoryview(b"abcdef"))
            shard.finish()
        assert (staging.path / layout.file).read_bytes()[-32:] == b"0123456789abcdef" + b"x" * 16


def test_given_digests_are_used_and_others_made(staging: Staging) -> None:
    (layout,) = layout_shards([T("a"), T("b")], None)
    with staging:
        with staging.shard(layout) as shard:
            shard.write("a", b"a" * 16)
            shard.write("b", b"b" * 16)
            shard.finish(lambda: {"a": "00" * 32})
        record = staging.records()[layout.file]
        truth = shard_digest_of_file(staging.path / layout.file)[1]
        assert record.tensors == {"a": "00" * 32, "b": truth["b"]}
        assert record.digest == shard_digest(layout.header, record.tensors.values())


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([("a", 17)], "more than 16 bytes for a"),
        ([("a", 10), ("a", 7)], "more than 16 bytes for a"),
        ([("a", 15), ("b", 16)], "tensor a has 15 of 16 bytes"),
        ([("a", 16)], "tensor b has 0 of 16 bytes"),
    ],
)
def test_our_own_mistakes(
    staging: Staging, tmp_path: Path, writes: list[tuple[str, int]], message: str
) -> None:
    (layout,) = layout_shards([T("a"), T("b")], None)
    before = len(os.listdir("/proc/self/fd"))

    def run() -> None:
        with staging, staging.shard(layout) as shard:
            for name, nbytes in writes:
                shard.write(name, bytes(nbytes))
            shard.finish()

    with pytest.raises(ValueError, match=message):
        run()
    assert len(os.listdir("/proc/self/fd")) < before
    assert os.listdir(tmp_path) == ["src"]


def test_a_copy_too_long_for_its_tensor_writes_nothing(staging: Staging, tmp_path: Path) -> None:
    (layout,) = layout_shards([T("a"), T("b")], None)
    fd = os.open(tmp_path / "src" / "config.json", os.O_RDONLY)
    with (
        pytest.raises(ValueError, match="more than 16 bytes for a"),
        staging,
        staging.shard(layout) as shard,
    ):
        shard.copy("a", [(fd, 0, 8), (fd, 0, 9)])
    os.close(fd)


def test_a_failed_hash_ends_the_run(staging: Staging, tmp_path: Path) -> None:
    (layout,) = layout_shards([T("a")], None)

    def fail() -> dict[str, str]:
        raise SourceError("source changed while reading")

    def run() -> None:
        with staging:
            with staging.shard(layout) as shard:
                shard.write("a", bytes(16))
                shard.finish(fail)
            staging.records()

    with pytest.raises(SourceError, match="source changed while reading"):
        run()
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("threads", [1, 3])
def test_shard_digest_notices_every_bit(staging: Staging, threads: int) -> None:
    (layout,) = layout_shards([T("a", (2,)), T("none", (0,)), T("b", (1,))], None)
    with staging:
        with staging.shard(layout) as shard:
            shard.write("a", bytes(8))
            shard.write("b", bytes(4))
            shard.finish()
        path = staging.path / layout.file
        record = staging.records()[layout.file]
        raw = path.read_bytes()
        for bit in range(len(layout.header) * 8, len(raw) * 8, 5):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            digest, tensors = shard_digest_of_file(path, threads=threads)
            assert digest != record.digest
            name = "a" if bit // 8 < len(layout.header) + 8 else "b"
            assert {n for n in tensors if tensors[n] != record.tensors[n]} == {name}
        # a header that means the same is another file all the same.
        path.write_bytes(raw.replace(b'"pt"}', b'"pt"}').replace(b'{"format"', b'{"fOrmat"'))
        assert shard_digest_of_file(path)[0] != record.digest


def test_layout_does_not_depend_on_anything_else() -> None:
    targets = [T(f"t{i}", (i,)) for i in range(9)]
    assert layout_shards(targets, 50) == layout_shards(list(targets), 50)
    (layout,) = layout_shards(targets[:1], None)
    assert replace(layout, file="x").header == layout.header
