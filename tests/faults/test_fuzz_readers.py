"""Whatever bytes lie in a checkpoint: it opens, or an `AdaconvertError` says why not."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaconvert.errors import AdaconvertError
from adaconvert.io.header import read_header
from adaconvert.io.names import check_relative_file, check_tensor_name, escape
from adaconvert.io.reader import read_bytes
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    DENSE_CONFIG,
    craft,
    dense_tensors,
    shard_bytes,
    write_config,
    write_dense,
    write_index,
)

BOUNDED = settings(
    max_examples=150,
    deadline=2000,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
GOOD = shard_bytes({"a": ("F32", (2,), bytes(8)), "b": ("BOOL", (3,), bytes(3))})
NAMES = st.sampled_from(["a", "b", "__metadata__", "dtype", "\x1b", "../a"]) | st.text(max_size=8)
NUMBERS = st.integers(-2, 12) | st.integers() | st.just(2**63) | st.booleans() | st.floats()
LEAVES = st.none() | NUMBERS | NAMES | st.sampled_from(["F32", "BOOL", "F8_E4M3", "x.safetensors"])
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "I64", "F4", "?"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


def survives(folder: Path) -> None:
    """Open the checkpoint in `folder`, read it if that works, and look at the message if not."""
    message, code = "", 3
    try:
        source = Source.open(folder)
        for ref in source.tensors.values():
            assert len(read_bytes(source, ref)) == ref.nbytes
        message = " ".join(source.notes)
    except AdaconvertError as error:
        message, code = str(error), error.exit_code
    assert code == 3
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 4000


def with_shard(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder)
        (folder / "model.safetensors").write_bytes(raw)
        survives(folder)


@BOUNDED
@given(st.binary(max_size=200))
def test_any_bytes_as_a_shard(raw: bytes) -> None:
    with_shard(raw)


@BOUNDED
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(-3, 3))
def test_a_good_shard_with_one_byte_changed_and_cut(at: int, byte: int, cut: int) -> None:
    raw = bytearray(GOOD)
    raw[at] = byte
    with_shard(bytes(raw[:cut]) if cut < 0 else bytes(raw) + bytes(cut))


@BOUNDED
@given(st.dictionaries(NAMES, ENTRIES | JSON, max_size=4), st.integers(0, 24))
def test_any_header(header: dict[str, object], data: int) -> None:
    with_shard(craft(header, bytes(data)))


@BOUNDED
@given(st.binary(max_size=120), st.integers(0, 24), st.integers(0, 2**64 - 1) | st.none())
def test_any_text_as_a_header(text: bytes, data: int, length: int | None) -> None:
    with_shard(craft(text, bytes(data), length))


@BOUNDED
@given(JSON | st.dictionaries(st.sampled_from(list(DENSE_CONFIG)), JSON))
def test_any_config(value: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write_dense(Path(name))
        (folder / "config.json").write_text(json.dumps(value))
        survives(folder)


@BOUNDED
@given(
    st.dictionaries(
        NAMES | st.sampled_from(list(dense_tensors())),
        st.sampled_from(["x.safetensors", "y.safetensors", "../x.safetensors"]) | JSON,
        max_size=5,
    ),
    JSON,
)
def test_any_index(weight_map: dict[str, object], total_size: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder)
        write_index(folder, weight_map, total_size)
        (folder / "x.safetensors").write_bytes(GOOD)
        (folder / "y.safetensors").write_bytes(shard_bytes({"c": ("F32", (1,), bytes(4))}))
        survives(folder)


@BOUNDED
@given(st.text(max_size=30) | st.text(alphabet="./\\:aC ~\x00", max_size=12))
def test_any_name(text: str) -> None:
    assert escape(text).isprintable()
    for check in (check_relative_file, check_tensor_name):
        message = ""
        try:
            check(text, "f")
        except AdaconvertError as error:
            message = str(error)
        climbs = ".." in text.replace("\\", "/").split("/") or text.startswith(("/", "\\"))
        assert message or not climbs
        assert message.isprintable()


def test_what_the_reference_refuses_is_refused() -> None:
    """Everything the safetensors package finds wrong with a shard, we find wrong too."""
    import safetensors

    raw = bytearray(GOOD)
    start = 8 + struct.unpack("<Q", GOOD[:8])[0]
    disagreements = []
    for at in range(start):
        for byte in (0, ord("1"), ord('"'), raw[at] ^ 1):
            changed = bytes(raw[:at]) + bytes([byte]) + bytes(raw[at + 1 :])
            if _reference_refuses(safetensors, changed) and not _we_refuse(changed):
                disagreements.append((at, byte))
    assert disagreements == []


def _reference_refuses(safetensors: object, raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)  # type: ignore[attr-defined]
    except Exception:
        return True
    return False


def _we_refuse(raw: bytes) -> bool:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(raw)
        file.flush()
        try:
            read_header(Path(file.name), "m.safetensors")
        except AdaconvertError:
            return True
        return False
