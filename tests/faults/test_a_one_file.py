"""Group A of the fault catalogue: one safetensors file. Each test names its row."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.reader import iter_chunks, read_bytes, read_numpy, read_torch
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    craft,
    entry,
    refusal,
    write_config,
)

NAME = "model.safetensors"
ONE = {"x": entry("F32", [2], 0, 8)}


def refused(folder: Path, raw: bytes) -> str:
    """Return how a checkpoint is refused whose only shard holds `raw`."""
    write_config(folder)
    (folder / NAME).write_bytes(raw)
    message = refusal(folder)
    assert message.startswith(NAME)
    return message


def opened(folder: Path, raw: bytes) -> Source:
    """Return a checkpoint whose only shard holds `raw`."""
    write_config(folder)
    (folder / NAME).write_bytes(raw)
    return Source.open(folder)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a1_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    unit = "byte" if size == 1 else "bytes"
    assert f"{NAME}: truncated: {size} {unit}; expected at least 8" in refused(
        tmp_path, bytes(size)
    )


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "header length is 0"),
        (1000, "truncated: the header is longer than the file; expected 1008 bytes, found"),
        (100_000_000, "truncated: the header is longer than the file; expected 100000008 bytes"),
        (100_000_001, "header too large; expected at most 100000000 bytes, found 100000001"),
        (2**63, f"header too large; expected at most 100000000 bytes, found {2**63}"),
        (2**64 - 1, "header too large"),
    ],
)
def test_a2_header_length(tmp_path: Path, length: int, message: str) -> None:
    assert f"{NAME}: {message}" in refused(tmp_path, craft(ONE, bytes(8), length))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"\xff": 1}', "header: is not UTF-8 text; found byte 0xff at offset 2"),
        (b"{nonsense}", "header: is not valid JSON"),
        (b'{"x": ', "header: is not valid JSON"),
        (b"[1, 2]", " header is not a JSON object; found an array"),
        (b'"text"', " header is not a JSON object; found a string"),
        (b"{" * 1000, "header: is not valid JSON"),
        (b'{"x":' * 100_000, "header: is nested too deeply"),
    ],
)
def test_a3_not_a_json_object(tmp_path: Path, header: bytes, message: str) -> None:
    assert message in refused(tmp_path, craft(header, bytes(8)))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (-1, "data section 1 byte short"),
        (-5, "data section 5 bytes short"),
        (1, "data section 1 byte long"),
        (6, "data section 6 bytes long"),
    ],
)
def test_a4_data_section(tmp_path: Path, cut: int, message: str) -> None:
    raw = craft(ONE, bytes(8 + cut))
    expected = f"{NAME}: {message}; expected a file of {len(raw) - cut} bytes, found {len(raw)}"
    assert expected in refused(tmp_path, raw)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (entry("F32", [2], 4, 12), "tensor 'b': data overlaps that of 'a' by 4 bytes"),
        (entry("F32", [2], 0, 8), "tensor 'b': data overlaps that of 'a' by 8 bytes"),
        (entry("F32", [2], 9, 17), "tensor 'b': data leaves a hole of 1 byte after 'a'"),
        (entry("F32", [2], 16, 8), "tensor 'b': data_offsets are not a range; found [16, 8]"),
        (entry("F32", [2], -8, 8), "tensor 'b': data_offsets holds something that is no size"),
        (entry("F32", [-2], 8, 16), "tensor 'b': shape holds something that is no size; found -2"),
        (entry("F32", [2], 8, 2**64), "tensor 'b': data_offsets holds something that is no size"),
    ],
)
def test_a5_offsets(tmp_path: Path, second: object, message: str) -> None:
    header = {"a": entry("F32", [2], 0, 8), "b": second}
    assert f"{NAME}: {message}" in refused(tmp_path, craft(header, bytes(16)))


def test_a5_a_hole_at_the_start(tmp_path: Path) -> None:
    raw = craft({"a": entry("F32", [2], 4, 12)}, bytes(12))
    assert "tensor 'a': data leaves a hole of 4 bytes after the start" in refused(tmp_path, raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2**62, 4]}, "shape overflows 63 bits"),
        ({"shape": [2**32, 2**32]}, "shape overflows 63 bits"),
        ({"shape": [3]}, "size does not match shape [3] of F32; expected 12 bytes, found 8 bytes"),
        ({"shape": []}, "size does not match shape [] of F32; expected 4 bytes, found 8 bytes"),
        ({"shape": [2.0]}, "shape holds something that is no size; found 2.0"),
        ({"shape": [True, 2]}, "shape holds something that is no size; found True"),
        ({"shape": ["2"]}, "shape holds something that is no size; found 2"),
        ({"shape": [10**400]}, "shape holds something that is no size; found 1000"),
        ({"shape": [1] * 17}, "shape is not an array of at most 16 numbers"),
        ({"shape": None}, "shape is not an array of at most 16 numbers; found None"),
        ({"data_offsets": [0]}, "data_offsets are not a range; found [0]"),
        ({"data_offsets": {"0": 8}}, "data_offsets is not an array"),
        ({"extra": 1}, "entry is malformed; expected dtype, shape and data_offsets"),
    ],
)
def test_a6_shapes(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    raw = craft({"x": ONE["x"] | changes}, bytes(8))
    assert f"{NAME}: tensor 'x': {message}" in refused(tmp_path, raw)


@pytest.mark.parametrize("value", [1, "text", [], None, {}, {"dtype": "F32"}])
def test_a6_an_entry_that_is_none(tmp_path: Path, value: object) -> None:
    assert "tensor 'x': entry is malformed" in refused(tmp_path, craft({"x": value}, bytes(8)))


@pytest.mark.parametrize("dtype", ["Q4_K", "f32", "", "\x1b[31m", 3, None, ["F32"]])
def test_a7_unknown_dtype(tmp_path: Path, dtype: object) -> None:
    message = refused(tmp_path, craft({"x": ONE["x"] | {"dtype": dtype}}, bytes(8)))
    assert "tensor 'x': unknown dtype '" in message
    assert "expected one of F64, F32, F16, BF16, I64" in message


def test_a8_duplicate_tensor(tmp_path: Path) -> None:
    one = b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    message = refused(tmp_path, craft(b"{" + one + b"," + one + b"}", bytes(4)))
    assert message == f"{NAME} header: duplicate tensor name 'x'"


def test_a8_duplicate_field(tmp_path: Path) -> None:
    raw = craft(b'{"x":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', bytes(4))
    assert refused(tmp_path, raw) == f"{NAME} header: duplicate field 'dtype'"


@pytest.mark.parametrize(("before", "after"), [(b"  ", b""), (b"", b"   "), (b"\n\t ", b" \n")])
def test_a9_white_space_is_accepted(tmp_path: Path, before: bytes, after: bytes) -> None:
    text = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    raw = craft(before + text + after, b"abcdefgh")
    source = opened(tmp_path, raw)
    assert read_bytes(source, source.tensors["x"]) == b"abcdefgh"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"epoch": 3}, "__metadata__ value of 'epoch' is not a string; found a number"),
        ({"a\n": None}, "__metadata__ value of 'a\\n' is not a string; found null"),
        ([], "__metadata__ is not a JSON object; found an array"),
        (None, "__metadata__ is not a JSON object; found null"),
        ({"format": "tf"}, "weights are laid out for tf; expected format pt"),
        ({"format": "flax"}, "weights are laid out for flax; expected format pt"),
    ],
)
def test_a10_metadata(tmp_path: Path, metadata: object, message: str) -> None:
    raw = craft({"__metadata__": metadata} | ONE, bytes(8))
    assert f"{NAME}: {message}" in refused(tmp_path, raw)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "mlx", "x": "y"}])
def test_a10_ordinary_or_no_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    header = ONE if metadata is None else {"__metadata__": metadata} | ONE
    assert set(opened(tmp_path, craft(header, bytes(8))).tensors) == {"x"}


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}])
def test_a11_no_tensors(tmp_path: Path, header: object) -> None:
    assert f"{NAME}: no tensors" in refused(tmp_path, craft(header))


def test_a12_empty_and_scalar_tensors(tmp_path: Path) -> None:
    raw = craft(
        {
            "z": entry("F32", [0, 5], 4, 4),
            "s": entry("F32", [], 0, 4),
            "y": entry("F32", [3, 0], 4, 4),
        },
        b"abcd",
    )
    source = opened(tmp_path, raw)
    assert {name: ref.shape for name, ref in source.tensors.items()} == {
        "s": (),
        "z": (0, 5),
        "y": (3, 0),
    }
    assert read_bytes(source, source.tensors["z"]) == b""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"'a\nb' holds control"),
        ("\x1b[31mred", r"'\x1b[31mred' holds control"),
        ("a\x00b", r"'a\x00b' holds control"),
        ("../../x", "'../../x' looks like a path"),
        ("\u202ex", r"'\u202ex' holds control or invisible characters"),
        ("\ud800", r"'\ud800' holds control or invisible characters"),
        ("x" * 1_000_000, "'" + "x" * 197 + "...' is 1000000 characters long"),
        ("", "'' is empty"),
    ],
)
def test_a13_hostile_names(tmp_path: Path, name: str, shown: str) -> None:
    message = refused(tmp_path, craft({name: ONE["x"]}, bytes(8)))
    assert message.startswith(f"{NAME}: tensor name {shown}")


@pytest.mark.parametrize("byte", [2, 127, 255])
def test_a14_bool_bytes(tmp_path: Path, byte: int) -> None:
    source = opened(tmp_path, craft({"m": entry("BOOL", [4], 0, 4)}, bytes([0, 1, 1, byte])))
    ref = source.tensors["m"]
    expected = f"{NAME}: BOOL tensor 'm' holds a byte that is neither 0 nor 1"
    for read in (read_bytes, read_numpy, read_torch):
        with pytest.raises(SourceError, match=expected):
            read(source, ref)
    with pytest.raises(SourceError, match=expected):
        list(iter_chunks(source, ref, 1))


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        ("F8_E4M3", 2),
        ("F8_E5M2", 2),
        ("F8_E8M0", 2),
        ("F6_E2M3", 2),
        ("F4", 1),
        ("C64", 16),
    ],
)
def test_a15_quantised_and_complex(tmp_path: Path, dtype: str, nbytes: int) -> None:
    tensors = {"a": entry("F32", [1], 0, 4), "w": entry(dtype, [2], 4, 4 + nbytes)}
    assert refused(tmp_path, craft(tensors, bytes(4 + nbytes))) == (
        f"{NAME}: tensor 'w': quantised or unsupported dtype {dtype}. "
        "Dequantise the checkpoint to bfloat16 or float32 first."
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4932\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (POINTER, "is a git-lfs pointer, not the weights. Run `git lfs pull` in the source."),
        (b"<!DOCTYPE html>\n<html>", "is an HTML or XML page saved under this name"),
        (b"\n  <html><body>404", "is an HTML or XML page saved under this name"),
        (b'<?xml version="1.0"?><Error>', "is an HTML or XML page saved under this name"),
        (b'{"error": "not found"}', "is a JSON text saved under this name"),
        (gzip.compress(bytes(100), mtime=0), "is gzip-compressed. Decompress it first."),
        (b"PK\x03\x04" + bytes(60), "is a zip archive, perhaps a pickle under a wrong name"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "is a GGUF file under a wrong name"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00" + bytes(60), "is a pickle under a wrong name"),
    ],
)
def test_a19_something_else_under_this_name(tmp_path: Path, raw: bytes, message: str) -> None:
    assert refused(tmp_path, raw).startswith(f"{NAME}: {message}")


@pytest.mark.parametrize("first", [0x80, 0x3C, 0x7B])
def test_a19_a_true_header_is_not_mistaken(tmp_path: Path, first: int) -> None:
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(first)
    assert struct.pack("<Q", len(header))[0] == first
    assert set(opened(tmp_path, craft(header, bytes(8))).tensors) == {"x"}
    assert "truncated: the header is longer" in refused(tmp_path, craft(header)[:-1])
